"""Some heads run for every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.gates.base import Gate, gate_from_config
from headwise.gates.selection import Selection

_ops = torch.ops.headwise


class SharedHeadsGate(Gate):
    """Some heads run for every input; any other gate chooses among the rest.

    The shared and routed heads of MoH (Jin et al. 2024, arXiv 2410.11842), for every gate of this
    package and your own: the gate inside is bound to a layer of ``H - s`` heads and never sees the
    shared ones. Its targets are shares of the *routed* heads: for a share t of all H heads give it
    ``(t H - s) / (H - s)``. Ours: a shared head has weight 1, where MoH weighs both kinds by a
    second router; and :func:`headwise.start_gates` shares the most important heads of each layer.

    ::

        hw.SharedHeadsGate(hw.BudgetGate(target=0.4), shared=2)

    Args:
        gate: what chooses among the other heads, unbound (or its configuration).
        shared: how many heads run for every input, or which; of a number, the first ones until
            :func:`headwise.start_gates` chooses.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

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
        if isinstance(gate, Mapping):
            gate = gate_from_config(gate)
        if not isinstance(gate, Gate):
            raise TypeError(f"gate must be a headwise.Gate, got {type(gate).__name__}")
        if gate.num_heads is not None:
            raise ValueError("gate must not be bound: it is bound to the heads that are not shared")
        if gate.reads_heads:
            raise ValueError(
                "gate must choose by the layer's input, and this one reads queries and keys"
            )
        heads = list(range(shared)) if isinstance(shared, int) else [int(head) for head in shared]
        for position, head in enumerate(heads):
            if head < 0 or (num_heads is not None and head >= num_heads):
                last = "H-1" if num_heads is None else num_heads - 1
                raise ValueError(f"shared must be in 0..{last}, got {head}")
            if head in heads[:position]:
                raise ValueError(f"shared must not name a head twice, got {head} again")
        super().__init__(
            {"gate": gate.config(), "shared": sorted(heads)},
            execution=gate.execution,
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        )

    def _build(self, device, dtype) -> None:
        heads = self._options["shared"]
        self.register_buffer("shared", torch.tensor(heads, dtype=torch.int64, device=device))
        inner = gate_from_config(self._options["gate"])
        self.gate = inner.bind(self.embed_dim, self.num_heads - len(heads), device, dtype)

    def config(self) -> dict[str, Any]:
        own = {name: self._options[name] for name in ("gate", "shared")}
        return {"type": type(self).__name__, **own}

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """The most relevant heads become the shared ones; the gate inside starts with the rest."""
        if relevance.shape != (self.num_heads,):
            raise ValueError(
                f"relevance must have shape [{self.num_heads}], got {list(relevance.shape)}"
            )
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
            self.expected_heads = self.gate.expected_heads + len(self.shared)
        return Selection(index, count, weight, relevance, routed.budget)
