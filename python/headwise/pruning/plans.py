"""Plans: which heads of a model stay, for every input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from headwise import _C
from headwise._C import HeadPlan, LayerPlan
from headwise.io.display import Grid, shown
from headwise.io.files import checked_file
from headwise.io.printable import layer_called, quoted
from headwise.pruning.scores import HeadScores

__all__ = ["HeadPlan", "LayerPlan", "plan"]

for _type in (HeadPlan, LayerPlan):
    _type.__module__ = __name__  # where pickle finds it


def loads_files(plan_type: Any) -> None:
    """Makes the ``load`` of a type of the core name what is no file."""
    load = plan_type.load

    def load_file(path: str | os.PathLike) -> Any:
        return load(checked_file("path", path))

    load_file.__doc__, load_file.__name__ = load.__doc__, "load"
    load_file.__qualname__ = f"{plan_type.__name__}.load"
    plan_type.load = staticmethod(load_file)


loads_files(HeadPlan)


def scales(plan: HeadPlan) -> dict[str, list[float]]:
    """Layer name -> the scale of each head ``[H]``; 0: dropped."""
    found = {entry.name: [0.0] * entry.num_heads for entry in plan.layers}
    for entry in plan.layers:
        for head, scale in zip(entry.heads, entry.scale, strict=True):
            found[entry.name][head] = scale
    return found


def _records(plan: HeadPlan) -> list[dict[str, Any]]:
    return [
        {"layer": entry.name, "head": head, "kept": head in entry.heads, "scale": scale}
        for entry, row in zip(plan.layers, scales(plan).values(), strict=True)
        for head, scale in enumerate(row)
    ]


def plan_grid(plan: HeadPlan) -> Grid:
    """The plot of a plan: the scale of each head, 0 if dropped."""
    kept = sum(len(entry.heads) for entry in plan.layers)
    total = sum(entry.num_heads for entry in plan.layers)
    by = f", by {plan.metric}" if plan.metric else ""
    scaled = any(scale != 1.0 for entry in plan.layers for scale in entry.scale)
    title = f"{kept} of {total} heads stay{by}"
    return Grid.of_heads(title, scales(plan), numbers=scaled)


shown(HeadPlan, _records, plan_grid)


def plan(
    scores: HeadScores,
    keep: float = 0.5,
    *,
    min_heads_per_layer: int = 0,
    scope: str = "model",
    groups: Mapping[str, Sequence[int]] | None = None,
) -> HeadPlan:
    """Keeps the most important heads.

    ``round(keep * heads)`` heads stay, but at least one: of the whole model (``scope="model"``,
    one ranking as in Michel et al. 2019, arXiv 1905.10650; layers then keep different numbers) or
    of each layer (``scope="layer"``). Ties keep the lower layer, then the lower head. The largest
    scores are the most important, except for the metric ``"entropy"``: the smallest are, because
    attention that is spread over all tokens carries little information.

    Args:
        scores: of :func:`headwise.score_heads`, or your own (:class:`headwise.HeadScores`).
        keep: the fraction that stays, in (0, 1].
        min_heads_per_layer: heads that every layer keeps (all, if it has fewer).
        scope: ``"model"`` or ``"layer"``.
        groups: the group of each head, layer by layer (:func:`headwise.nn.head_groups`): heads that
            share keys and values are then kept or dropped together, ranked by the mean of their
            scores. ``keep`` is a share of the groups, and every layer keeps enough groups for
            ``min_heads_per_layer`` heads.

    Returns:
        A plan with all scales 1, for :func:`headwise.prune` and :func:`headwise.mask`.

    Raises:
        TypeError: ``scores`` or ``groups`` is something else, or ``keep`` is not a number.
        ValueError: a score is not finite, ``keep`` is outside (0, 1], or it leaves fewer heads than
            ``min_heads_per_layer`` requires, or ``groups`` do not fit the scores.

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
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep must be a number in (0, 1], got {quoted(keep)}")
    if groups is None:
        return _C.plan(scores.core, keep, min_heads_per_layer, scope)
    return _plan_of_groups(scores, keep, min_heads_per_layer, scope, groups)


def _plan_of_groups(
    scores: HeadScores,
    keep: float,
    min_heads_per_layer: int,
    scope: str,
    groups: Mapping[str, Sequence[int]],
) -> HeadPlan:
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"groups must map layer names to groups (headwise.nn.head_groups), got {quoted(groups)}"
        )
    members: dict[str, list[list[int]]] = {}
    for name, values in scores.values.items():
        own = list(groups.get(name, ()))
        if len(own) != len(values) or sorted(set(own)) != list(range(len(set(own)))):
            raise ValueError(
                f"groups must name a group for each of the {len(values)} heads of "
                f"{layer_called(name)}, "
                f"counted from 0, got {own}"
            )
        heads = range(len(own))
        members[name] = [[h for h in heads if own[h] == group] for group in sorted(set(own))]
    means = {
        name: torch.stack([values[heads].mean() for heads in members[name]])
        if members[name]
        else values
        for name, values in scores.values.items()
    }
    largest = max((len(heads) for own in members.values() for heads in own), default=1)
    least = -(-min_heads_per_layer // largest)
    chosen = _C.plan(HeadScores(scores.metric, means).core, keep, least, scope)
    entries = []
    for entry in chosen.layers:
        kept = sorted(head for group in entry.heads for head in members[entry.name][group])
        entries.append(LayerPlan(entry.name, len(scores.values[entry.name]), kept))
    about = {"keep": keep, "min_heads_per_layer": min_heads_per_layer, "scope": scope}
    return HeadPlan(entries, scores.metric, {**about, "groups": True})
