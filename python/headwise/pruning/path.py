"""Pruning by steps: the plans on the way from all heads to a few."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from headwise import _C
from headwise.convert.conversion import converted
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.io.store import Store
from headwise.nn.batches import batch_list
from headwise.nn.intervention import (
    LossFunction,
    check_journal_loss,
    contents_of,
)
from headwise.nn.layers import attention_layers
from headwise.pruning.apply import prune
from headwise.pruning.plans import HeadPlan, LayerPlan
from headwise.pruning.scores import METRICS, HeadScores, score_heads

__all__ = ["pruning_path"]


def pruning_path(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    keep: float = 0.5,
    *,
    step: float = 0.1,
    exact: bool = True,
    metric: str = "michel",
    min_heads_per_layer: int = 0,
    journal: str | os.PathLike | None = None,
    progress: bool | None = None,
    **scoring: Any,
) -> list[HeadPlan]:
    """Plans that remove the least important heads step by step, the last one keeping ``keep``.

    Michel et al. 2019 (arXiv 1905.10650), section 4: every step removes the lowest ``step`` of the
    model's heads in one ranking over all layers. ``exact`` scores the remaining heads again after
    every step, as the authors' code does with that option; without it one ranking serves all steps.
    Every plan keeps a subset of the heads of the plan before it.

    Args:
        model: a converted or convertible model without gates; it is left as it was.
        batches: input of ``loss_fn``; read once and kept.
        loss_fn: as in :func:`headwise.score_heads`.
        keep: the fraction of the heads that the last plan keeps, in (0, 1].
        step: the fraction of all heads that one step removes, in (0, 1]; at least one head.
        exact: score again after every step.
        metric: one of :func:`headwise.score_heads`.
        min_heads_per_layer: heads that every layer keeps (all, if it has fewer).
        journal: checkpoint file; an interrupted run resumes from it.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.
        **scoring: further options of :func:`headwise.score_heads`.

    Returns:
        A plan for each step, from the most heads to the fewest; with ``keep=1`` one, of all heads.

    Raises:
        ValueError: an option out of range, a model that has gates, a journal of another model,
            other data, another loss or other options, or what :func:`headwise.score_heads` and
            :func:`headwise.plan` raise.
    """
    _C.pruning_counts(1, keep, step)  # raises if out of range
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {quoted(metric)}")
    model = converted(model)
    for name, layer in attention_layers(model).items():
        if layer.gate is not None:
            raise ValueError(
                f"model must have no gates, got a {type(layer.gate).__name__} in "
                f"{layer_called(name)}: "
                "prune by a plan of what gates choose (headwise.pruning.plan_from_use, or of "
                "static ones headwise.plan_from_gates), or remove them (layer.set_gate(None))"
            )
    batches = batch_list(batches)
    settings: dict[str, Any] = {
        "keep": keep, "step": step, "exact": exact, "metric": metric,
        "min_heads_per_layer": min_heads_per_layer, **scoring,
    }  # fmt: skip
    log = Store(
        journal,
        "pruning path",
        settings if journal is None else {**settings, **contents_of(model, batches)},
    )

    if batches:
        check_journal_loss(log, model, batches, loss_fn)

    def score(pruned: nn.Module) -> HeadScores:
        return score_heads(pruned, batches, loss_fn, [metric], progress=False, **scoring)[metric]

    first = log.get("scores")
    scores = score(model) if first is None else HeadScores.from_json(first)
    if first is None:
        log.add("scores", scores.to_json())
    sizes = {name: len(values) for name, values in scores.values.items()}
    whole = HeadPlan([LayerPlan(name, size, list(range(size))) for name, size in sizes.items()])
    total = sum(sizes.values())
    counts = _C.pruning_counts(total, keep, step)
    _C.narrowed(whole, scores.core, counts[-1], min_heads_per_layer)  # can it be reached?
    plans: list[HeadPlan] = []
    for count in with_progress(counts, "pruning", "step", progress):
        kept = log.get(str(count))
        if kept is None:
            before = whole
            if exact and plans:
                before = plans[-1]
                scores = score(prune(model, before))
            chosen = _C.narrowed(before, scores.core, count, min_heads_per_layer)
            kept = {entry.name: entry.heads for entry in chosen.layers}
            log.add(str(count), kept)
        layers = [LayerPlan(name, sizes[name], kept[name]) for name in sizes]
        about = {"keep": count / total, "step": step, "exact": exact}
        about["min_heads_per_layer"] = min_heads_per_layer
        plans.append(HeadPlan(layers, metric, about))
    return plans
