"""Cohere and Cohere 2 of transformers version 5: GLM's attention, with norms whose weights differ
between heads (Cohere, ``use_qk_norm``), or with rotations only in layers with a window (Cohere 2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.neighbours import Neighbours, SelectedNeighbourAttention
from headwise.convert.replacements import replacement_classes
from headwise.nn.decoder_inputs import set_parameter

if TYPE_CHECKING:
    from headwise._C import LayerPlan
    from headwise.gates.selection import Selection
    from headwise.nn.grouped_query_attention import GroupedQueryAttention


class SelectedHeadNormAttention(SelectedNeighbourAttention):
    """Replaces ``CohereAttention``; ``q_norm.weight [H, d]``, ``k_norm.weight [Hkv, d]``."""

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        if getattr(original, "q_norm", None) is not None:
            for name, heads in (("q_norm", self.num_heads), ("k_norm", self.num_key_value_heads)):
                norm = copy.deepcopy(getattr(original, name))
                norm.weight = nn.Parameter(torch.ones(heads, self.head_dim, **factory))
                setattr(self, name, norm)

    def _share_norms(self, other: GroupedQueryAttention) -> None:
        """They have their own, of their numbers of heads."""

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        smaller, groups = super().pruned(entry), self.head_groups
        if self.q_norm is not None:
            shared = sorted({groups[head] for head in entry.heads})
            for name, heads in (("q_norm", entry.heads), ("k_norm", shared)):
                old = getattr(self, name).weight
                set_parameter(getattr(smaller, name), "weight", old.detach()[heads], old)
        return smaller

    def _project(
        self,
        linear: nn.Module,
        x: Tensor,
        num_heads: int,
        norm: nn.Module | None,
        chosen: Selection | None,
    ) -> Tensor:
        heads = super()._project(linear, x, num_heads, None, chosen)  # [B, H, L, d]
        return heads if norm is None else norm(heads.transpose(1, 2)).transpose(1, 2)


selected, __getattr__ = replacement_classes(__name__, SelectedHeadNormAttention)


class Cohere(Neighbours):
    name = "transformers Cohere"
    replacement_class = staticmethod(selected)
    children = ("q_norm", "k_norm")

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> SelectedHeadNormAttention:
        replacement = super().replacement(module, sizes)
        assert isinstance(replacement, SelectedHeadNormAttention)
        replacement.rotates = getattr(module, "sliding_window", 0) is not None
        return replacement


ARCHITECTURE = Cohere()
