"""Calibrating a dynamic model to an average number of heads, by one number for the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import headwise as hw

#: The share of heads may miss its target by this much before a run is reported as missed.
TOLERANCE = 0.02


def _threshold_parameter(gate: nn.Module) -> Tensor | None:
    """The parameter whose shift makes the gate choose more heads of every input, or fewer.

    BudgetGate: the bias of the budget's logit. HardConcreteGate and GumbelSigmoidGate: the logit of
    every head. None if the number of heads is fixed.
    """
    if isinstance(gate, hw.BudgetGate):
        return gate.budget_out.bias if gate.fixed_budget is None else None
    if isinstance(gate, hw.HardConcreteGate):
        return gate.log_alpha
    if isinstance(gate, hw.GumbelSigmoidGate):
        return gate.logit
    return None


class Threshold:
    """One number that is added to the threshold of every gate of a model."""

    def __init__(self, model: nn.Module):
        found = [_threshold_parameter(m) for m in model.modules() if isinstance(m, hw.Gate)]
        self._start = [(p, p.detach().clone()) for p in found if p is not None]

    def __len__(self) -> int:
        return len(self._start)

    @torch.no_grad()
    def set(self, shift: float) -> None:
        """``shift`` > 0: more heads; 0: as trained."""
        for parameter, start in self._start:
            parameter.copy_(start + shift)


def calibrate(
    model: nn.Module,
    heads_used: Callable[[], float],
    target: float,
    *,
    reach: float = 8.0,
    precision: float = 0.01,
    most: int = 12,
) -> float:
    """Shifts the gates' thresholds until the average share of heads meets ``target``.

    Args:
        model: changed in place.
        heads_used: measures the share of heads on held-out inputs.
        target: the share wanted.
        reach: largest shift tried.
        precision: accepted distance from the target.
        most: maximum number of measurements.

    Returns:
        The shift; 0 if the trained thresholds were near enough.
    """
    threshold = Threshold(model)
    used = heads_used()
    if abs(used - target) <= precision or not len(threshold):
        return 0.0
    best, best_error = 0.0, abs(used - target)
    low, high = (0.0, reach) if used < target else (-reach, 0.0)
    step = 0.25 if used < target else -0.25
    shift, bracketed = step, False
    for _ in range(most - 1):
        threshold.set(shift)
        used = heads_used()
        if abs(used - target) < best_error:
            best, best_error = shift, abs(used - target)
        if best_error <= precision:
            break
        if used < target:
            low = shift
            bracketed = bracketed or step < 0
        else:
            high = shift
            bracketed = bracketed or step > 0
        # Trained thresholds are near the target: widen from there, then halve.
        shift = (low + high) / 2 if bracketed else max(-reach, min(reach, 3 * shift))
    threshold.set(best)
    return best
