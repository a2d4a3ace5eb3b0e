"""T5 of transformers version 5 and the models whose attention is the same code under another name
(mT5): scores without a scale, and a relative
position bias that the first layer makes for all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert import older_t5
from headwise.convert.arguments import one_cache
from headwise.convert.decoder import TransformersProjected
from headwise.convert.older_versions import relative_bias
from headwise.convert.projections import Places
from headwise.convert.registry import Architecture, family
from headwise.convert.relative_bias import SelectedBiasedAttention
from headwise.convert.replacements import replacement_classes

#: Prefix of a model's classes -> their module.
FAMILY = family(__name__)

PLACES = Places("q", "k", "v", "o")


class T5Replacement(SelectedBiasedAttention):
    """Replaces ``T5Attention``."""

    places = PLACES

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.attend`; also returns the bias ``[1, H, L, S]`` of all
        heads of the model, for the next layer."""
        made = [position_bias]

        def bias(keys: int, position: int | Tensor) -> Tensor:
            whole = made[0]
            if whole is None:
                whole = made[0] = relative_bias(self, hidden_states.size(1), keys, position)
            return self.own_bias(whole)

        output, maps = self.attend(
            hidden_states,
            mask,
            one_cache(self, cache, past_key_values),
            options,
            memory=key_value_states,
            bias=bias if self.has_relative_attention_bias or position_bias is not None else None,
        )
        return output, made[0], maps


selected, __getattr__ = replacement_classes(__name__, T5Replacement)


class T5(TransformersProjected):
    name = "transformers T5"
    replacement_class = staticmethod(selected)
    places = PLACES
    children = ("relative_attention_bias",)
    attributes = ("config", "is_causal", "is_decoder", "layer_idx", "has_relative_attention_bias")

    def of(self, module: nn.Module) -> Architecture:
        return self if hasattr(module, "scaling") else older_t5.ARCHITECTURE

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        return {
            "num_heads": module.n_heads,
            "num_key_value_heads": module.n_heads,
            "head_dim": module.key_value_proj_dim,
            "dropout": module.dropout,
            "scale": module.scaling,
        }


ARCHITECTURE = T5()
