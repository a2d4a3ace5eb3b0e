"""Heads chosen at random: the baseline that every other gate must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.selection import Selection


class RandomGate(Gate):
    """Runs a share of the heads chosen at random.

    {options}

    Raises:
        ValueError: ``keep`` outside (0, 1].
    """

    relevance: Tensor

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
