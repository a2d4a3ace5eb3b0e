"""Gates that are trained towards a share of the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.scheduled import ScheduledGate


class TargetedGate(ScheduledGate):
    """A gate with a target share of heads, a schedule and a penalty.

    Its options are ``keep``, ``initial_keep``, ``warmup``, ``target_scope``, ``strength``,
    ``static_until`` and ``hard_from``, and its own.
    """

    _RECORDED = ("expected_heads", "_regulariser")
    #: Default of ``strength`` by the form of the penalty, if it is not 20.
    _STRENGTHS: ClassVar[Mapping[str, float]] = {}
    strength: float | None
    #: The part of the penalty that belongs to this layer alone.
    _regulariser: Tensor | None

    def _prepare(self) -> None:
        self._regulariser = None
        if self.strength is None:
            self.strength = self._STRENGTHS.get(self.penalty_form, 20.0)

    @property
    def penalty_form(self) -> str:
        return self._options.get("penalty", "squared")

    def penalty(self) -> Tensor:
        """This layer's regulariser, with its own target whatever ``target_scope`` is."""
        if self.num_heads is None or self.expected_heads is None:
            return super().penalty()
        return penalty_of([self])

    def without_gradient(self) -> str | None:
        """Why the penalty of the last forward has no gradient; None if it has, or should not."""
        if not (torch.is_grad_enabled() and self.learns_count):
            return None
        if self.expected_heads is None or self.expected_heads.requires_grad:
            return None
        if any(parameter.requires_grad for parameter in self.parameters()):
            return (
                "the forward ran without gradients: run it without torch.no_grad, and checkpoint "
                "with use_reentrant=False"
            )
        return "the gates are frozen: set requires_grad_(True) on them, which adapters (PEFT) clear"

    @property
    def learns_count(self) -> bool:
        """Whether the number of heads depends on parameters."""
        return True

    def _multipliers(self) -> Tensor | None:
        return None


def trained(gates: Sequence[Gate]) -> list[TargetedGate]:
    """The gates with a target share that have run in training."""
    return [g for g in gates if isinstance(g, TargetedGate) and g.expected_heads is not None]


def penalty_of(gates: Sequence[Gate]) -> Tensor:
    """The regulariser of these gates, a scalar: of pools with one target each, and their own."""
    aimed = trained(gates)
    others = [g for g in gates if not isinstance(g, TargetedGate)]
    return torch.ops.headwise.gates_penalty(
        [gate.expected_heads for gate in aimed],
        [gate.num_heads for gate in aimed],
        [type(gate).__name__ for gate in aimed],
        [gate.target_scope == "model" for gate in aimed],
        [gate.progress for gate in aimed],
        [gate.keep for gate in aimed],
        [gate.initial_keep for gate in aimed],
        [gate.warmup for gate in aimed],
        [gate.strength for gate in aimed],
        [gate.penalty_form for gate in aimed],
        [gate._multipliers() for gate in aimed],
        [gate._regulariser for gate in aimed],
        [gate.penalty() for gate in others if type(gate).penalty is not Gate.penalty],
    )
