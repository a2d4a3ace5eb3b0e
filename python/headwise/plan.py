"""Plans: which heads of a model stay, for every input."""

from __future__ import annotations

from headwise import _C
from headwise._C import HeadPlan, LayerPlan
from headwise.importance import HeadScores

__all__ = ["HeadPlan", "LayerPlan", "plan"]

for _type in (HeadPlan, LayerPlan):
    _type.__module__ = __name__  # where pickle finds it


def plan(
    scores: HeadScores, keep: float = 0.5, *, min_heads_per_layer: int = 0, scope: str = "global"
) -> HeadPlan:
    """Keeps the most important heads.

    ``round(keep * heads)`` heads stay, but at least one: of the whole model (``scope="global"``,
    one ranking as in Michel et al. 2019, arXiv 1905.10650; layers then keep different numbers) or
    of each layer (``scope="layer"``). Ties keep the lower layer, then the lower head. The largest
    scores are the most important; of the metric ``"entropy"`` the smallest, since attention that is
    spread over all tokens says little.

    Args:
        scores: of :func:`headwise.score_heads`, or your own (:class:`headwise.HeadScores`).
        keep: the fraction that stays, in (0, 1].
        min_heads_per_layer: heads that every layer keeps (all, where it has fewer).
        scope: ``"global"`` or ``"layer"``.

    Returns:
        A plan with all scales 1, for :func:`headwise.prune` and :func:`headwise.mask`.

    Raises:
        TypeError: ``scores`` is something else.
        ValueError: a score is not finite, ``keep`` is outside (0, 1], or it leaves fewer heads than
            ``min_heads_per_layer`` asks for.

    Example:
        >>> scores = HeadScores("mine", {"layer.0": [0.1, 0.9], "layer.1": [0.5, 0.2]})
        >>> [entry.heads for entry in plan(scores, keep=0.5).layers]
        [[1], [0]]
    """
    if not isinstance(scores, HeadScores):
        raise TypeError(
            f"scores must be a headwise.HeadScores, got {type(scores).__name__}"
            + (": take one of its metrics" if isinstance(scores, dict) else "")
        )
    return _C.plan(scores.core, keep, min_heads_per_layer, scope)
