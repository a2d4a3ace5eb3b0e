"""Attention with a learned relative position bias for each head, made in one place of a model and
passed to all of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.decoder import SelectedDecoderAttention

if TYPE_CHECKING:
    from headwise._C import LayerPlan


class SelectedBiasedAttention(SelectedDecoderAttention):
    """The bias has all of the model's heads, some of which this layer may have lost.

    Attributes:
        bias_heads: int64 ``[H]``: the heads of the bias that are the layer's own.
    """

    rotates = False
    bias_heads: Tensor

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        if getattr(
            self, "has_relative_attention_bias", False
        ):  # of all heads: others read them too
            self.relative_attention_bias = original.relative_attention_bias
        device = None if factory.get("device") == "meta" else factory.get("device")
        self.register_buffer("bias_heads", torch.arange(self.num_heads, device=device))

    def pruned(self, entry: LayerPlan) -> SelectedBiasedAttention:
        smaller = super().pruned(entry)
        assert isinstance(smaller, SelectedBiasedAttention)
        smaller.bias_heads = self.bias_heads[entry.heads]
        return smaller

    def own_bias(self, bias: Tensor) -> Tensor:
        """``[B or 1, heads of the model, L, S]`` -> ``[B or 1, H, L, S]``"""
        return bias.index_select(1, self.bias_heads)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """As :meth:`ProjectedReplacement.original_state`; the original's bias has all heads."""
        state.pop(f"{name}.bias_heads")
        super().original_state(name, state)
