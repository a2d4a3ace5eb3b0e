"""WavLM of transformers version 5: a relative position bias that the first layer makes for all, and
that each head of each layer multiplies by a gate made of its slice of the layer's input (Chen et
al. 2021, arXiv 2110.13900, section III-B).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.bart import PLACES
from headwise.convert.decoder import TransformersProjected
from headwise.convert.relative_bias import SelectedBiasedAttention
from headwise.convert.replacements import replacement_classes
from headwise.nn.proof import Draw, Trial

_KEPT = ("gru_rel_pos_linear", "rel_attn_embed")


class SelectedGatedBiasAttention(SelectedBiasedAttention):
    """Replaces ``WavLMAttention``. Attention maps are those of each head; the original gives each
    head their mean.

    ``gru_rel_pos_const [1, heads of the model, 1, 1]``: their number cuts the input into slices.
    """

    places = PLACES
    is_causal = False
    config = None

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        self.gru_rel_pos_const = original.gru_rel_pos_const
        for name in _KEPT:
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *,
        index: int = 0,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As :meth:`SelectedDecoderAttention.attend`; also returns the bias ``[B * heads of the
        model, L, L]``, for the next layer."""
        options["output_attentions"] = output_attentions or None
        (batch, length, _), heads = hidden_states.shape, self.gru_rel_pos_const.size(1)
        if position_bias is None:
            made = self.compute_bias(length, length)  # [heads of the model, L, L]
            position_bias = made.expand(batch, -1, -1, -1).flatten(0, 1)
        whole = position_bias.view(batch, heads, length, length)
        slices = hidden_states.unflatten(2, (heads, -1))[:, :, self.bias_heads].transpose(1, 2)
        parts = self.gru_rel_pos_linear(slices).unflatten(3, (2, -1)).sum(-1)  # [B, H, L, 2]
        a, b = torch.sigmoid(parts).chunk(2, dim=-1)
        gate = a * (b * self.gru_rel_pos_const[:, self.bias_heads] - 1.0) + 2.0  # [B, H, L, 1]
        own = gate * self.own_bias(whole)
        output, maps = self.attend(
            hidden_states, attention_mask, None, options, bias=lambda *_: own
        )
        return output, maps, position_bias


selected, __getattr__ = replacement_classes(__name__, SelectedGatedBiasAttention)


class WavLM(TransformersProjected):
    name = "transformers WavLM"
    replacement_class = staticmethod(selected)
    places = PLACES
    children = _KEPT
    parameters = ("gru_rel_pos_const",)
    attributes = ()

    def trial(self, module: nn.Module) -> Trial:
        width, heads = module.embed_dim, module.num_heads

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            tokens, bias = draw(2, 5, width), draw(2 * heads, 5, 5)
            calls: list[tuple[Tensor | None, Tensor | None]] = [
                (~draw.padding(2, 5), bias),
                (None, bias),
            ]
            calls += [(None, None)] if hasattr(own, "rel_attn_embed") else []
            return [own(tokens, attention_mask=m, position_bias=b)[0] for m, b in calls]

        return run


ARCHITECTURE = WavLM()
