"""ALBERT of transformers version 5: one layer (or a few) that the model runs many times.

``AlbertAttention`` holds query, key, value, the output projection and what follows it. It is
replaced by a module with the same forward around one :class:`headwise.MultiheadAttention`, which
the model calls once for each of its layers: the weights and the gate are shared, but each call
makes its own choice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.albert.modeling_albert import AlbertAttention

from headwise.convert.transformers_attention import EncoderReplacement, SeparateProjections
from headwise.nn.multihead_attention import MultiheadAttention


class SelectedAlbertAttention(EncoderReplacement, AlbertAttention):
    """Replaces ``AlbertAttention``.

    It is an ``AlbertAttention`` so that transformers finds it when it collects attention weights
    (``output_attentions=True``).
    """

    PROJECTIONS = ("query", "key", "value", "dense")

    def __init__(self, original: AlbertAttention, mha: MultiheadAttention):
        super().__init__(original, mha)
        self.output_dropout = original.output_dropout
        self.LayerNorm = original.LayerNorm

    def forward(  # type: ignore[override]  # without maps, None
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`EncoderReplacement.forward`, with the residual connection and its norm."""
        output, maps = super().forward(hidden_states, attention_mask, **options)
        return self.LayerNorm(hidden_states + self.output_dropout(output)), maps


class Albert(SeparateProjections):
    name = "transformers ALBERT"
    children = {
        "": (
            *SelectedAlbertAttention.PROJECTIONS,
            "LayerNorm",
            "attention_dropout",
            "output_dropout",
        )
    }

    def projections(self, module: AlbertAttention) -> dict[str, nn.Linear]:
        return {name: getattr(module, name) for name in self.children[""][:4]}

    def shape(self, module: AlbertAttention) -> tuple[int, int, float]:
        return module.num_attention_heads, module.attention_head_size, module.attention_dropout.p

    def replacement(self, old: AlbertAttention, mha: MultiheadAttention) -> nn.Module:
        return SelectedAlbertAttention(old, mha)


ARCHITECTURE = Albert()
