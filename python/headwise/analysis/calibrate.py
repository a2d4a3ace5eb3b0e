"""Finding the threshold of gates that are not trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from headwise import _C
from headwise.gates import ThresholdGate
from headwise.gates.model import gates
from headwise.gates.selection import Selection
from headwise.io.progress import progress_bar
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.batches import batch_list, run_model
from headwise.nn.instrumenting import instrument
from headwise.nn.intervention import ForwardFunction

__all__ = ["calibrate_threshold"]


@torch.no_grad()
def calibrate_threshold(
    model: nn.Module,
    batches: Iterable[Any],
    keep: float,
    *,
    forward_fn: ForwardFunction = run_model,
    passes: int = 12,
    tolerance: float = 0.1,
    progress: bool | None = None,
) -> float:
    """Sets the one threshold of the model's :class:`ThresholdGate` gates for a share of heads.

    The scores of a layer's heads depend on the heads that ran before it, so the threshold is found
    by bisection, running the model on ``batches`` for each trial.

    Args:
        model: put in evaluation mode while it runs.
        batches: calibration data; read once per trial.
        keep: mean share of the heads that should run, in (0, 1].
        forward_fn: ``(model, batch)`` runs the model; its result is not used.
        passes: trials.
        tolerance: how far the share may be from ``keep``; 1 accepts any.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        The threshold, also set in the gates: of those tried, the one with the nearest share.

    Raises:
        ValueError: ``keep`` outside (0, 1], no batches, a model without such a gate, or a share
            that cannot be reached (the text names the nearest), because gates have ``min_heads``,
            or because queries and keys are so small that their integer parts are zero and all heads
            score the same (raise the gates' ``resolution``). The gates then keep their thresholds,
            also if a batch fails.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if not 0.0 <= tolerance <= 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    found = [gate for gate in gates(model) if isinstance(gate, ThresholdGate)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) must have a ThresholdGate")
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty")
    before = [gate.threshold.clone() for gate in found]
    use = [0, 0, 0.0]  # heads that ran, heads, highest relevance

    def observe(name: str, layer: AttentionLayer, selection: Selection, x, padding) -> None:
        if isinstance(layer.gate, ThresholdGate):
            use[0] += int(selection.count.sum())
            use[1] += selection.weight.numel()
            if selection.relevance is not None and selection.relevance.numel():
                use[2] = max(use[2], selection.relevance.max().item())

    bar = progress_bar(None, "calibrating", "batch", progress)  # trials may end early
    with bar, instrument(model) as opened:
        opened.observe(observe)

        def run(threshold: float) -> tuple[int, int, float]:
            use[:] = 0, 0, 0.0
            for gate in found:
                gate.threshold.fill_(threshold)
            for batch in batches:
                forward_fn(model, batch)
                bar.update()
            return int(use[0]), int(use[1]), use[2]

        try:
            nearest = _C.find_threshold(run, keep, passes, tolerance)
        except BaseException:
            for gate, threshold in zip(found, before, strict=True):
                gate.threshold.copy_(threshold)
            raise
    for gate in found:
        gate.threshold.fill_(nearest)
    return nearest
