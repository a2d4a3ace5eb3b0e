"""Which heads to remove, if the others will be repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from headwise import _C
from headwise.convert.conversion import converted
from headwise.io.printable import layer_called
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list, call_model
from headwise.nn.layers import attention_layers
from headwise.pruning.reconstruction import catch_up, output_moments
from headwise.pruning.replay import Replay
from headwise.pruning.scores import HeadScores

__all__ = ["repair_scores"]


def repair_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ridge: float = 1e-3,
    groups: bool = False,
    progress: bool | None = None,
) -> HeadScores:
    """How badly the other heads of a layer compensate for each head: scores for
    :func:`headwise.plan`.

    In each layer heads are removed one by one, always the one for which the others, repaired,
    compensate best: the exact increase of the least squares error, as ZipLM (arXiv 2302.04089)
    removes structures and OSSCAR (2403.12983) columns. A head's score is the increase of the error
    when it is removed, as a share of the variance of the layer's output, and at least the score of
    the heads removed before it; so one ranking over all layers removes them in this order, and
    layers lose heads where that costs least. No labels are needed. Inputs of all layers are the
    dense model's.

    Args:
        model: a converted or convertible model, unchanged.
        batches: calibration data, as in :func:`headwise.repair`.
        forward_fn: as in :func:`headwise.repair`.
        ridge: of the least squares, as a share of the mean variance of an input.
        groups: remove whole groups of heads that share keys and values; a group's heads get its
            score, for ``headwise.plan(..., groups=headwise.nn.head_groups(model))``.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        Scores of the metric ``"repair"``.

    Raises:
        ValueError: no batches, activations that are NaN or infinite, or ``groups`` in a layer whose
            groups are of different sizes.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to score heads on")
    model = converted(model)
    replay = Replay(model, batches, call_model if forward_fn is None else forward_fn)
    layers = attention_layers(model)
    names = [name for name in replay.sites if name in layers]
    found = {}
    with replay.running():
        for name in with_progress(names, "scoring heads", "layer", progress):
            catch_up(name, replay)
            (moments, held_out), _ = output_moments(replay, replay, name)
            if held_out is not moments:
                moments.merge(held_out)
            found[name] = _scores(moments, layers[name], name, ridge, groups)
    return HeadScores("repair", {name: found[name] for name in layers if name in found})


def _scores(
    moments: _C.OutputMoments, layer: nn.Module, name: str, ridge: float, groups: bool
) -> torch.Tensor:
    """float64 [H]."""
    each = 1
    if groups and layer.num_heads:
        sizes = torch.tensor(layer.head_groups).bincount()
        each = int(sizes[0])
        if bool((sizes != each).any()):
            raise ValueError(
                f"groups of {layer_called(name)} must be of one size, got {sizes.tolist()}: they "
                "were pruned before"
            )
    weight = layer.output_projection.weight.detach()
    order = _C.removal_order(moments, weight, each * layer.head_dim, ridge)
    variance = moments.variance() or 1.0
    scores = torch.zeros(layer.num_heads, dtype=torch.float64)
    before = largest = 0.0
    for unit, error in zip(order.units, order.error, strict=True):
        # Never less than the earlier ones: a ranking must not keep a head that was removed before
        # them.
        largest = max(largest, (error - before) / variance)
        before = error
        scores[unit * each : (unit + 1) * each] = largest
    return scores
