"""One choice for all query heads that share keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.gates.base import Gate, gate_from_config, inner_gate
from headwise.gates.selection import Selection
from headwise.io.printable import quoted

_ops = torch.ops.headwise


class GroupGate(Gate):
    """Chooses whole groups of query heads: those that share a key/value head run together or not.

    Any other gate chooses among the groups: the inner gate is bound to a layer of G heads, one per
    group, and its targets are shares of the groups. The heads of a group get the group's weight and
    relevance. In a layer without shared heads (:class:`headwise.MultiheadAttention`) each head is a
    group. Grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245.

    ::

        hw.convert(llama, hw.GroupGate(hw.BudgetGate(keep=0.5)))

    Args:
        gate: what chooses among the groups, unbound (or its configuration).
        groups: for each of the H heads the number of its group, ascending from 0; a layer gives
            them when it binds the gate.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

    Buffer ``place`` int64 ``[H]``, the group of each head; submodule ``gate``.

    Raises:
        TypeError: ``gate`` is not a gate.
        ValueError: ``groups`` that do not fit ``num_heads``, a gate that is bound, or one that
            reads queries and keys (:class:`ThresholdGate`).
    """

    place: Tensor
    wraps = True

    def __init__(
        self,
        gate: Gate | Mapping[str, Any],
        *,
        groups: Sequence[int] | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        inner = inner_gate(gate, "the groups of the layer")
        if (groups is None) != (num_heads is None):
            raise ValueError(
                "GroupGate must be a layer's gate itself, not inside another gate: a layer knows "
                "its groups"
            )
        if groups is not None:
            groups = [int(group) for group in groups]
            expected = sorted(set(groups)) == list(range(len(set(groups))))
            if len(groups) != num_heads or groups != sorted(groups) or not expected:
                raise ValueError(
                    f"groups must be ascending from 0, one for each of {num_heads} heads, got "
                    f"{quoted(groups)}"
                )
        self.__dict__["groups"] = groups
        super().__init__(
            {"gate": inner.config()},
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        )

    @property
    def execution(self) -> str:
        """The inner gate's execution."""
        return self._options["gate"].get("execution", "all")

    @property
    def num_groups(self) -> int:
        return len(set(self.groups))

    def _build(self, device, dtype) -> None:
        inner = gate_from_config(self._options["gate"])
        self.gate = inner.bind(self.embed_dim, self.num_groups, device, dtype)
        place = torch.tensor(self.groups, dtype=torch.int64, device=device)
        self.register_buffer("place", place)

    def bind_groups(
        self, embed_dim: int, groups: Sequence[int], device=None, dtype=None
    ) -> GroupGate:
        """As :meth:`bind`, for a layer whose head h is in group ``groups[h]``."""
        bound = type(self)(
            self._options["gate"],
            groups=groups,
            embed_dim=embed_dim,
            num_heads=len(groups),
            device=device,
            dtype=dtype,
        )
        return bound.train(self.training)

    def config(self) -> dict[str, Any]:
        inner = self._options["gate"] if self.num_heads is None else self.gate.config()
        return {"type": type(self).__name__, "gate": inner}

    def static_weight(self) -> Tensor | None:
        weight = self.gate.static_weight()  # [G]
        return None if weight is None else weight[self.place]

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """The inner gate starts with the mean relevance of each group's heads."""
        self._check_relevance(relevance)
        if hasattr(self.gate, "start_from"):
            place = self.place.to(relevance.device)
            total = relevance.new_zeros(self.num_groups).index_add(0, place, relevance)
            self.gate.start_from(total / place.bincount().to(total), budget)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        chosen = self.gate(x, key_padding_mask)  # of G groups
        index, count, weight = _ops.choose_group_heads(
            chosen.index, chosen.count, chosen.weight, self.place
        )
        relevance = None if chosen.relevance is None else chosen.relevance[:, self.place]
        if self.training and self.gate.expected_heads is not None:
            per_group = self.num_heads / max(self.num_groups, 1)
            self._record(expected_heads=self.gate.expected_heads * per_group)
        return Selection(index, count, weight, relevance, chosen.budget)
