"""Some heads run for every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.gates.base import Gate, gate_from_config, inner_gate
from headwise.gates.options import checked
from headwise.gates.selection import Selection

_ops = torch.ops.headwise


class SharedHeadsGate(Gate):
    """Some heads run for every input; any other gate chooses among the rest.

    The shared and routed heads of MoH (Jin et al. 2024, arXiv 2410.11842), for every gate of this
    package and your own: the inner gate is bound to a layer of ``H - s`` heads and never sees the
    shared ones. Its targets are shares of the *routed* heads: for a share t of all H heads give it
    ``(t H - s) / (H - s)``. Ours: a shared head has weight 1, whereas MoH weights both kinds by a
    second router; and :func:`headwise.start_gates` makes the most important heads of each layer the
    shared ones.

    ::

        hw.SharedHeadsGate(hw.BudgetGate(keep=0.4), shared=2)

    {options}

    Buffer ``shared`` int64 ``[s]``, ascending; submodule ``gate``.

    Raises:
        TypeError: ``gate`` is not a gate.
        ValueError: a shared head outside ``0..H-1`` or named twice, a gate that is bound, or one
            that reads queries and keys (:class:`ThresholdGate`).
    """

    shared: Tensor
    wraps = True

    def __init__(
        self,
        gate: Gate | Mapping[str, Any],
        shared: int | Sequence[int] = 1,
        *,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        inner = inner_gate(gate, "the heads that are not shared")
        # The inner gate may be one that the table does not know.
        options = {"gate": {"type": "FixedGate"}, "shared": shared}
        found = sorted(checked("SharedHeadsGate", options)["shared"])
        if num_heads is not None and found and found[-1] >= num_heads:
            raise ValueError(f"shared must be in 0..{num_heads - 1}, got {found[-1]}")
        super().__init__(
            {"gate": inner.config(), "shared": found},
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        )

    @property
    def execution(self) -> str:
        """The inner gate's execution."""
        return self._options["gate"].get("execution", "all")

    def _build(self, device, dtype) -> None:
        heads = self.__dict__.pop("shared")  # the option, which the buffer replaces
        self.register_buffer("shared", torch.tensor(heads, dtype=torch.int64, device=device))
        inner = gate_from_config(self._options["gate"])
        self.gate = inner.bind(self.embed_dim, self.num_heads - len(heads), device, dtype)

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """The most relevant heads become the shared ones; the inner gate starts with the rest."""
        self._check_relevance(relevance)
        always = len(self.shared)
        order = relevance.argsort(descending=True, stable=True)
        self.shared.copy_(order[:always].sort().values)
        routed = self.num_heads - always
        if routed and hasattr(self.gate, "start_from"):
            rest = _ops.routed_first(self.shared, self.num_heads)[:routed]
            left = (budget * self.num_heads - always) / routed
            self.gate.start_from(relevance.to(rest.device)[rest], min(max(left, 0.0), 1.0))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        routed = self.gate(x, key_padding_mask)
        scores = routed.weight.detach() if routed.relevance is None else routed.relevance
        index, count, weight, relevance = _ops.share_heads(
            routed.index, routed.count, routed.weight, scores, self.shared
        )
        if self.training and self.gate.expected_heads is not None:
            self._record(expected_heads=self.gate.expected_heads + len(self.shared))
        return Selection(index, count, weight, relevance, routed.budget)
