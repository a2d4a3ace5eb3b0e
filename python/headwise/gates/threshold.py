"""Heads dropped by the integer parts of their queries and keys; nothing is trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.selection import Selection, select_all

_ops = torch.ops.headwise


class HeadInputs(NamedTuple):
    """A layer's queries and keys, for gates that choose by them."""

    q: Tensor  # [B, H, L, d]
    k: Tensor  # [B, H, S', d], the keys that the layer adds at the end
    key_padding_mask: Tensor | None  # [B, S]
    query_padding_mask: Tensor | None  # [B, L]
    attn_mask: Tensor | None  # [L, S] or [B, H, L, S]
    is_causal: bool
    added_keys: int  # how many of the keys masks do not cover

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
        """As operators take them."""
        return self.key_padding_mask, self.query_padding_mask, self.attn_mask, self.is_causal


class ThresholdGate(Gate):
    r"""Hybrid dynamic pruning: a head runs if the integer parts of its scores are large enough.

    Jaradat et al. (2024, arXiv 2407.12893): queries and keys are split into integer and fraction,
    :math:`Q = I_Q + F_Q`, :math:`K = I_K + F_K`. Scores :math:`I_Q I_K^T` are cheap; the absolute
    sums of their blocks decide which blocks are pruned, row by row, and a head whose importance is
    not above the threshold is dropped early; the rest is computed from three of the four products,
    without :math:`F_Q F_K^T`. Nothing is trained.

    *Reconstruction* (the paper does not give these in full): the integer part is taken towards
    zero; a row's threshold is :math:`\rho \max + (1-\rho)\,\mathrm{mean}` for :math:`\rho \ge 0`
    and :math:`-\rho \min + (1+\rho)\,\mathrm{mean}` below; a head's importance is the sum over its
    blocks. *Ours*: that sum grows with the square of the length, so by default it is divided by the
    number of scores a query may see; ``resolution``; ``min_heads``.

    Deciding needs the queries and keys of every head, so a dropped head saves its values, attention
    and output. Pruned blocks and missing products save nothing in this software: they show what the
    method's own hardware would compute, with plain operators.

    {options}

    Buffer ``threshold`` float32 ``[]``.

    Raises:
        ValueError: an argument out of its range.
        RuntimeError: called outside a layer.
    """

    reads_heads = True
    threshold: Tensor

    def _build(self, device, dtype) -> None:
        value = self.__dict__.pop("threshold")
        self.register_buffer("threshold", torch.tensor(value, device=device))

    def reset_parameters(self) -> None:
        if self.num_heads is not None:
            self.threshold.fill_(self._options["threshold"])

    @property
    def attends(self) -> bool:  # type: ignore[override]
        return self.block_ratio is not None or self.approximate

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        heads: HeadInputs | None = None,
    ) -> Selection:
        """Chooses heads by ``heads``, which the layer passes. ``relevance`` is the importance."""
        self._check_bound(x)
        if heads is None:
            raise RuntimeError(
                "ThresholdGate chooses by queries and keys: it works as the gate of a layer"
            )
        _, _, importance = _ops.integer_importance(
            heads.q,
            heads.k,
            *heads.masks,
            self.resolution,
            self.block,
            self.normalize,
            heads.added_keys,
        )  # [B, H]
        index, count = _ops.select_above(importance, self.threshold, self.min_heads)
        weight = _ops.selection_mask(index, count, x.dtype)  # [B, H]
        if self.training:
            self._record(expected_heads=weight.sum(1))
            if self.execution == "all":
                index, count = select_all(x.size(0), self.num_heads, device=x.device)[:2]
        return Selection(index, count, weight, importance)

    def attend(self, heads: HeadInputs, v: Tensor) -> Tensor:
        """``v [B, H, S', d]`` -> ``[B, H, L, d]``: attention on kept blocks and products."""
        return _ops.hybrid_attention(
            heads.q,
            heads.k,
            v,
            *heads.masks,
            self.resolution,
            self.block,
            self.block_ratio,
            self.approximate,
            heads.added_keys,
        )
