"""ModernBERT of transformers version 5: one projection to queries, keys and values, rotary
embeddings, and windows on every layer but some. The converted layer has copies of the projection's
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.projections import Places
from headwise.convert.replacements import replacement_classes

PLACES = Places(output="Wo", packed="Wqkv")


class ModernBertReplacement(SelectedDecoderAttention):
    """Replaces ``ModernBertAttention``."""

    places = PLACES

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        self.out_drop = original.out_drop

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.forward`, without a cache."""
        output, maps = super().forward(
            hidden_states, position_embeddings, attention_mask, **options
        )
        return self.out_drop(output), maps


selected, __getattr__ = replacement_classes(__name__, ModernBertReplacement)


class ModernBert(TransformersProjected):
    name = "transformers ModernBERT"
    replacement_class = staticmethod(selected)
    places = PLACES
    children = ("out_drop",)

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        heads = module.config.num_attention_heads
        return {
            "num_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": module.head_dim,
            "dropout": module.attention_dropout,
            "scale": module.head_dim**-0.5,
        }

    def rotates(self, module: nn.Module) -> bool:
        return True


ARCHITECTURE = ModernBert()
