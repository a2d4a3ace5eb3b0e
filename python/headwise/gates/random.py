"""Heads chosen at random: the baseline that every other gate must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.options import flag, fraction
from headwise.gates.selection import Selection


class RandomGate(Gate):
    """Runs a share of the heads chosen at random.

    Args:
        keep: share of the heads that run, in (0, 1]; the count is ``round(keep * H)`` and at least
            one.
        per_input: draw anew for every sequence, from torch's default generator (so that
            ``torch.manual_seed`` decides), in training and in evaluation; otherwise one choice is
            drawn when the gate is bound and kept in the buffer ``relevance`` ``[H]``.
        execution: see :class:`Gate`.
        embed_dim: width of the layer's input.
        num_heads: heads of the layer, H.
        device: of the buffer.
        dtype: of the buffer.

    Raises:
        ValueError: ``keep`` outside (0, 1].
    """

    relevance: Tensor
    _OPTIONS = {"keep": fraction, "per_input": flag}

    def __init__(
        self,
        keep: float = 0.5,
        *,
        per_input: bool = True,
        execution: str = "selected",
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(**self._declared(locals()))

    def _build(self, device, dtype) -> None:
        self.register_buffer("relevance", torch.empty(self.num_heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        if self.num_heads is not None:
            self.relevance.uniform_()

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        batch = x.size(0)
        if self.per_input:
            relevance = torch.rand(batch, self.num_heads, device=x.device)  # [B, H]
        else:
            relevance = self.relevance.float().expand(batch, -1)  # [B, H]
        ops = torch.ops.headwise
        budget = torch.full((batch,), self.keep, device=x.device)  # [B]
        count = ops.budget_count(budget, self.num_heads, 1, "round")  # [B]
        index = ops.select_heads(relevance, count)
        weight = ops.selection_mask(index, count, x.dtype)
        return Selection(index, count, weight, relevance, budget)
