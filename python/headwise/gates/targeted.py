"""Gates that are trained towards a share of the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.gates.options import choice, fraction, moment, not_negative, unit
from headwise.gates.scheduled import ScheduledGate

_ops = torch.ops.headwise

TARGET_SCOPES = ("model", "layer")


class TargetedGate(ScheduledGate):
    """A gate with a target share of heads, a schedule and a penalty.

    Subclasses declare the options of their own beside these, one of them named by
    ``_INITIAL``: the share that is aimed at when training starts.
    """

    _OPTIONS = {
        "target": fraction,
        "target_scope": choice(*TARGET_SCOPES),
        "strength": not_negative,
        "warmup": unit,
        "static_until": unit,
        "hard_from": moment,
    }
    _INITIAL = "initial_target"
    _RECORDED = ("expected_heads", "_regulariser")
    penalty_form = "squared"

    def __init__(self, options: Mapping[str, Any], **binding: Any) -> None:
        super().__init__(options, **binding)
        self._regulariser: Tensor | None = None

    @property
    def initial_share(self) -> float:
        """The share of heads that is aimed at when training starts."""
        return self._options[self._INITIAL]

    def regulariser(self) -> Tensor | None:
        """The part of the penalty that belongs to this layer alone, or None."""
        return self._regulariser

    def penalty(self) -> Tensor:
        """This layer's regulariser, with a target of its own whatever ``target_scope`` says."""
        if self.num_heads is None or self.expected_heads is None:
            return super().penalty()
        term = pooled_penalty([self])
        return term if self._regulariser is None else term + self._regulariser

    def ran_without_gradients(self) -> bool:
        """Whether the penalty of the last forward should have a gradient and has none."""
        return (
            torch.is_grad_enabled()
            and not self.expected_heads.requires_grad
            and self.learns_count
            and any(parameter.requires_grad for parameter in self.parameters())
        )

    @property
    def learns_count(self) -> bool:
        """Whether the number of heads depends on parameters."""
        return True

    def penalty_pool(self) -> tuple | None:
        """Gates of equal pools share one target; None: this gate has its own."""
        if self.target_scope != "model":
            return None
        return (
            type(self),
            self.target,
            self.strength,
            self.warmup,
            self.penalty_form,
            self.initial_share,
        )

    def _multipliers(self) -> Tensor | None:
        return None


def pooled_penalty(gates: Sequence[TargetedGate]) -> Tensor:
    """One penalty on the mean share of heads over the gates' layers and the batch."""
    first = gates[0]
    return _ops.target_penalty(
        [gate.expected_heads for gate in gates],
        [gate.num_heads for gate in gates],
        first.progress,
        first.target,
        first.initial_share,
        first.warmup,
        first.strength,
        first.penalty_form,
        first._multipliers(),
    )
