"""T5 as older versions of transformers write it: the first layer hands on its position bias with
the mask added to it, no attention knows whether it is self- or cross-attention, and the maps are a
third output only if they are asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.arguments import one_cache
from headwise.convert.decoder import TransformersProjected, cache_word, link
from headwise.convert.older_versions import mask_sizes, query_offset, relative_bias
from headwise.convert.projections import Places
from headwise.convert.relative_bias import SelectedBiasedAttention
from headwise.convert.replacements import replacement_classes
from headwise.nn.proof import Draw, Trial

PLACES = Places("q", "k", "v", "o")


class OlderT5Replacement(SelectedBiasedAttention):
    """Replaces ``T5Attention``.

    Attributes:
        is_causal: whether it is self-attention of the decoder; for :func:`link`, since its masks
            say who sees whom.
    """

    places = PLACES
    config = None
    is_causal = False

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        *,
        past_key_values: Any = None,
        query_length: Any = None,
        output_attentions: bool | None = False,
        **options: Any,
    ) -> tuple[Tensor | None, ...]:
        """As :meth:`SelectedDecoderAttention.attend`; also returns the bias ``[B or 1, H, L, S]``
        of all heads of the model, with the mask, for the next layer."""
        past = one_cache(self, cache, past_key_values)
        whole = position_bias
        if whole is None:
            whole = self._bias(hidden_states, key_value_states, past, options)
            whole = whole if mask is None else whole + mask[..., : whole.size(3)]
        options["output_attentions"] = bool(output_attentions)
        output, maps = self.attend(
            hidden_states, self.own_bias(whole), past, options, memory=key_value_states
        )
        return (output, whole, maps) if output_attentions else (output, whole)

    def _bias(self, x: Tensor, memory: Tensor | None, past: Any, options: dict[str, Any]) -> Tensor:
        length, keys = x.size(1), x.size(1)
        position: int | Tensor = 0
        if memory is not None:
            keys = memory.size(1)
        elif past is not None:
            own = getattr(past, "self_attention_cache", past)
            position = query_offset(own, self.layer_idx, options)
            keys, _ = mask_sizes(own, length, self.layer_idx)
        if self.has_relative_attention_bias:
            return relative_bias(self, length, keys, position)
        return x.new_zeros(1, self.n_heads, length, keys)


selected, __getattr__ = replacement_classes(
    __name__, OlderT5Replacement, classes_of="headwise.convert.t5"
)


class OlderT5(TransformersProjected):
    name = "transformers T5"
    replacement_class = staticmethod(selected)
    places = PLACES
    children = ("relative_attention_bias",)
    attributes = ("is_decoder", "layer_idx", "has_relative_attention_bias")

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        return {
            "num_heads": module.n_heads,
            "num_key_value_heads": module.n_heads,
            "head_dim": module.key_value_proj_dim,
            "dropout": module.dropout,
            "scale": 1.0,
        }

    def trial(self, module: nn.Module) -> Trial:
        width = module.get_submodule(PLACES.output).out_features
        return functools.partial(_outputs, width=width, cache_word=cache_word(module))

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        for block in model.modules():
            own = block._modules.get("SelfAttention")
            if isinstance(own, OlderT5Replacement):
                own.is_causal = own.is_decoder
        link(model)


def _outputs(own: nn.Module, draw: Draw, width: int, cache_word: str) -> list[Tensor]:
    """A trial of attention and its replacement, over its own sequence and over another: with
    padding, without a mask, and with a bias that an earlier layer made."""
    tokens, memory = draw(2, 5, width), draw(2, 4, width)
    made = []
    for keys in (tokens, memory):
        options: dict[str, Any] = {} if keys is tokens else {"key_value_states": memory}
        options["cache_position"] = torch.arange(5, device=tokens.device)  # of older versions
        padding = draw.padding(2, keys.size(1))[:, None, None, :].expand(-1, -1, 5, -1)
        first = own(tokens, mask=draw.added(padding), **options)
        later = own(tokens, position_bias=first[1], **options)
        made += [first[0], later[0], own(tokens, **options)[0]]
    # The original takes its softmax in float32.
    return [output.float() if output.dtype == torch.float64 else output for output in made]


ARCHITECTURE = OlderT5()
