"""Choosing HIES's share of importance on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.convert.conversion import converted
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list
from headwise.nn.instrumenting import evaluating
from headwise.nn.intervention import LossFunction, example_losses
from headwise.pruning.apply import prune
from headwise.pruning.plans import HeadPlan, plan
from headwise.pruning.scores import HeadScores, hies

__all__ = ["AlphaSearch", "select_alpha"]


@dataclass(frozen=True)
class AlphaSearch:
    """What :func:`select_alpha` found.

    Attributes:
        alpha: the best one.
        scores: its scores.
        plan: its plan.
        values: every alpha that was tried -> the mean loss of the model pruned by its plan.
    """

    alpha: float
    scores: HeadScores
    plan: HeadPlan
    values: Mapping[float, float]


def select_alpha(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    importance: HeadScores,
    entropy: HeadScores,
    keep: float = 0.5,
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    scope: str = "model",
    min_heads_per_layer: int = 0,
    progress: bool | None = None,
) -> AlphaSearch:
    """The alpha of :func:`headwise.pruning.hies` with the best plan, as the paper tunes it.

    arXiv 2510.13832. The plan whose pruned model has the lowest mean loss. Alphas that give the
    same plan are evaluated once. Of equally good ones the largest wins: the nearest to importance
    alone.

    Args:
        model: a converted or convertible model; it is restored.
        batches: input of ``loss_fn``: data that the scores and the final test do not see.
        loss_fn: ``(model, batch) -> [B]``, one loss per example, the smaller the better; the error
            (0 or 1) measures accuracy.
        importance: per-example importance.
        entropy: normalised attention entropy.
        keep: the fraction of heads that plans keep.
        alphas: what to try, each in [0, 1].
        scope: the heads over which :func:`headwise.pruning.hies` scales.
        min_heads_per_layer: heads that every layer keeps.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no alphas, no batches, a loss that is not finite or not one per example, or an
            error of :func:`headwise.pruning.hies` or :func:`headwise.plan`.
    """
    if not alphas:
        raise ValueError("alphas must not be empty")
    model, batches = converted(model), batch_list(batches)
    known: list[tuple[list, float]] = []  # (heads by layer, value)
    best: tuple[float, HeadScores, HeadPlan] | None = None
    values: dict[float, float] = {}
    for alpha in with_progress(sorted(set(alphas)), "alphas", "alpha", progress):
        scores = hies(importance, entropy, alpha, scope)
        candidate = plan(scores, keep, min_heads_per_layer=min_heads_per_layer)
        heads = [entry.heads for entry in candidate.layers]
        value = next((value for other, value in known if other == heads), None)
        if value is None:
            small = prune(model, candidate)
            with evaluating(small):
                value = example_losses(small, batches, loss_fn).mean().item()
            known.append((heads, value))
        values[alpha] = value
        if best is None or value <= values[best[0]]:
            best = (alpha, scores, candidate)
    assert best is not None
    return AlphaSearch(best[0], best[1], best[2], values)
