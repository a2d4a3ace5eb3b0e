"""Choosing HIES's share of importance on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        values: every alpha that was tried -> what ``evaluate`` said of its plan.
    """

    alpha: float
    scores: HeadScores
    plan: HeadPlan
    values: Mapping[float, float]


def select_alpha(
    importance: HeadScores,
    entropy: HeadScores,
    evaluate: Callable[[HeadPlan], float],
    keep: float = 0.5,
    *,
    alphas: Sequence[float] = tuple(step / 10 for step in range(11)),
    scope: str = "global",
    min_heads_per_layer: int = 0,
) -> AlphaSearch:
    """The alpha of :func:`headwise.pruning.hies` whose plan does best, as the paper tunes it.

    arXiv 2510.13832. Alphas that give the same plan are evaluated once. Of equally good ones the
    largest is taken: the nearest to importance alone.

    Args:
        importance: per-example importance.
        entropy: normalised attention entropy.
        evaluate: how good a plan is, on data that the scores and the final test do not see; the
            larger the better: ``lambda plan: accuracy(headwise.prune(model, plan))``.
        keep: the fraction of heads that plans keep.
        alphas: what to try, each in [0, 1].
        scope: over what :func:`headwise.pruning.hies` scales.
        min_heads_per_layer: heads that every layer keeps.

    Raises:
        ValueError: no alphas, ``evaluate`` does not give a number, or what
            :func:`headwise.pruning.hies` and :func:`headwise.plan` raise.
    """
    if not alphas:
        raise ValueError("alphas must not be empty")
    known: list[tuple[list, float]] = []  # (heads by layer, value)
    best: tuple[float, HeadScores, HeadPlan] | None = None
    values: dict[float, float] = {}
    for alpha in sorted(set(alphas)):
        scores = hies(importance, entropy, alpha, scope)
        candidate = plan(scores, keep, min_heads_per_layer=min_heads_per_layer)
        heads = [entry.heads for entry in candidate.layers]
        value = next((value for other, value in known if other == heads), None)
        if value is None:
            value = float(evaluate(candidate))
            if math.isnan(value):
                raise ValueError(f"evaluate must give a number, got NaN for alpha={alpha}")
            known.append((heads, value))
        values[alpha] = value
        if best is None or value >= values[best[0]]:
            best = (alpha, scores, candidate)
    return AlphaSearch(*best, values)
