"""OLMo 2 and OLMo 3 of transformers version 5: Llama's attention with norms over the queries of all
heads together, and over their keys.

A head therefore needs the queries and keys of the others, whether these run or not: their
projections are computed for every head, and a pruned layer keeps those of the removed heads
(``q_rest``, ``k_rest``). What is chosen is the rest: attention, values if no chosen head reads
them, and the output projection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.decoder import SelectedDecoderAttention
from headwise.convert.llama import Llama
from headwise.convert.replacements import replacement_classes
from headwise.nn.decoder_inputs import linear, set_parameter

if TYPE_CHECKING:
    from headwise._C import LayerPlan
    from headwise.gates.selection import Selection
    from headwise.nn.grouped_query_attention import GroupedQueryAttention


class SelectedOlmoAttention(SelectedDecoderAttention):
    """Replaces ``Olmo2Attention``.

    Attributes:
        whole: the numbers of query and of key/value heads before pruning, over which the norms go.
        q_rest: to the queries of removed heads; None: there are none, or the layer has no heads.
        k_rest: to their keys.
    """

    whole: tuple[int, int]
    q_rest: nn.Linear | None
    k_rest: nn.Linear | None

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        own = (self.num_heads, self.num_key_value_heads)
        self.whole = getattr(original, "whole", own)
        for name, before, now in zip(("q_rest", "k_rest"), self.whole, own, strict=True):
            rows = (before - now) * self.head_dim if now else 0
            bias = self.q_proj.bias is not None
            setattr(self, name, linear(self.embed_dim, rows, bias, factory) if rows else None)

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        smaller, groups = super().pruned(entry), self.head_groups
        assert isinstance(smaller, SelectedOlmoAttention)
        shared = sorted({groups[head] for head in entry.heads})
        for which, kept, heads in (
            ("q", entry.heads, self.num_heads),
            ("k", shared, self.num_key_value_heads),
        ):
            norm, rest = getattr(self, f"{which}_norm"), getattr(self, f"{which}_rest")
            gone = [head for head in range(heads) if head not in kept]
            if not kept or not gone:
                setattr(smaller, f"{which}_rest", rest if kept else None)
                continue
            for name, old in getattr(self, f"{which}_proj").named_parameters():
                rows = _rows(old.detach(), gone, self.head_dim)
                if rest is not None:
                    rows = torch.cat([rows, getattr(rest, name).detach()])
                set_parameter(getattr(smaller, f"{which}_rest"), name, rows, old)
            # The norm's weights in the order of what it gets.
            weight = norm.weight.detach()
            own, more = weight[: heads * self.head_dim], weight[heads * self.head_dim :]
            made = copy.deepcopy(norm)
            parts = [_rows(own, kept, self.head_dim), _rows(own, gone, self.head_dim), more]
            set_parameter(made, "weight", torch.cat(parts), norm.weight)
            setattr(smaller, f"{which}_norm", made)
        return smaller

    def _project(
        self,
        linear: nn.Module,
        x: Tensor,
        num_heads: int,
        norm: nn.Module | None,
        chosen: Selection | None,
    ) -> Tensor:
        if norm is None or num_heads == 0:
            return super()._project(linear, x, num_heads, None, chosen)
        rest = self.q_rest if norm is self.q_norm else self.k_rest
        rows = own = linear(x)  # [B, L, H d]
        if rest is not None:
            rows = torch.cat([own, rest(x)], dim=-1)
        rows = norm(rows)[..., : own.size(-1)]
        return rows.view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)


def _rows(tensor: Tensor, heads: list[int], width: int) -> Tensor:
    return tensor.unflatten(0, (-1, width))[heads].flatten(0, 1)


selected, __getattr__ = replacement_classes(__name__, SelectedOlmoAttention)


class Olmo2(Llama):
    name = "transformers OLMo 2"
    replacement_class = staticmethod(selected)


ARCHITECTURE = Olmo2()
