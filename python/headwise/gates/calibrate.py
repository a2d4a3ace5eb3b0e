"""Finding the threshold of gates that are not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from headwise import _C
from headwise.gates.model import gates
from headwise.gates.options import fraction, unit
from headwise.gates.threshold import ThresholdGate


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


@torch.no_grad()
def calibrate_threshold(
    model: nn.Module,
    batches: Iterable[Any],
    keep: float,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    passes: int = 12,
    tolerance: float = 0.1,
) -> float:
    """Sets the one threshold of the model's :class:`ThresholdGate` gates for a share of heads.

    What a layer's heads score depends on the heads that ran before it, so the threshold is found by
    halving, with the model run on ``batches`` for each trial.

    Args:
        model: put in evaluation mode while it runs.
        batches: calibration data; gone through once for each trial.
        keep: mean share of the heads that should run, in (0, 1].
        forward_fn: runs a batch; default ``model(**batch)`` of a mapping, ``model(batch)`` else.
        passes: trials.
        tolerance: how far the share may be from ``keep``; 1 accepts any.

    Returns:
        The threshold, which the gates now have: of those tried the one whose share is nearest.

    Raises:
        ValueError: ``keep`` outside (0, 1], no batches, a model without such a gate, or a share
            that cannot be reached (the text names the nearest): where gates have ``min_heads``, or
            where queries and keys are so small that their integer parts are zero and all heads
            score the same (raise the gates' ``resolution``). The gates then keep the thresholds
            that they had, as they do where a batch fails.
    """
    fraction("keep", keep)
    unit("tolerance", tolerance)
    found = [gate for gate in gates(model) if isinstance(gate, ThresholdGate)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) must have a ThresholdGate")
    batches = list(batches)
    if not batches:
        raise ValueError("batches must not be empty")
    was_training = model.training
    model.eval()
    before = [gate.threshold.clone() for gate in found]
    ran, importance = [], []

    def record(gate, arguments, selection):
        ran.append((int(selection.count.sum()), selection.weight.numel()))
        importance.append(selection.relevance.max().item())

    hooks = [gate.register_forward_hook(record) for gate in found]
    try:

        def share(threshold: float) -> float:
            for gate in found:
                gate.threshold.fill_(threshold)
            ran.clear()
            for batch in batches:
                forward_fn(model, batch)
            return sum(heads for heads, _ in ran) / max(1, sum(total for _, total in ran))

        everything = (0.0, share(0.0))
        high = max(importance, default=0.0)
        nearest = _C.nearest_by_halving(share, keep, 0.0, high, passes, everything)
        _C.check_calibrated(nearest, keep, tolerance)
        for gate in found:
            gate.threshold.fill_(nearest[0])
    except BaseException:
        for gate, threshold in zip(found, before, strict=True):
            gate.threshold.copy_(threshold)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return nearest[0]
