"""Are heads with a role used differently from the others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headwise.explain.use import number

_ops = torch.ops.headwise


def role_use(
    roles: dict[str, Any], use: dict[str, Any], permutations: int, seed: int
) -> list[dict[str, Any]]:
    """Are heads with a role used differently from the others?

    For each kind of role and each property of heads (how often they run; how much more for long
    inputs, for inputs of high entropy, for confident predictions): the rank-biserial correlation
    over heads, its permutation test, and the false discovery rate over the whole table.
    """
    with_roles = [
        (_kinds_of(head["roles"]), used)
        for layer, own in zip(roles["layers"], use["layers"], strict=True)
        for head, used in zip(layer["heads"], own["heads"], strict=True)
    ]
    kinds = sorted({kind for found, _ in with_roles for kind in found})
    rows: list[dict[str, Any]] = []
    for key in ("frequency", "length", "entropy", "confidence"):
        usable = [
            (found, used[key] if key == "frequency" else used[key]["correlation"])
            for found, used in with_roles
            if used[key] is not None
        ]
        if len(usable) < 2 or not kinds:
            continue
        has = torch.tensor([[kind in found for kind in kinds] for found, _ in usable])
        values = torch.tensor([value for _, value in usable], dtype=torch.float64)
        correlation, p = _ops.selection_association(has, values, permutations, seed)
        for place, kind in enumerate(kinds):
            count = int(has[:, place].sum())
            if 0 < count < len(usable):
                rows.append(
                    {
                        "role": kind,
                        "heads": count,
                        "others": len(usable) - count,
                        "property": key,
                        "mean": number(values[has[:, place]].mean()),
                        "mean_of_others": number(values[~has[:, place]].mean()),
                        "correlation": number(correlation[place]),
                        "p": number(p[place]),
                    }
                )
    rates = _ops.false_discovery_rate(torch.tensor([row["p"] for row in rows]))
    for row, rate in zip(rows, rates.tolist(), strict=True):
        row["q"] = number(rate)
    return rows


def _kinds_of(found: Sequence[dict[str, Any]]) -> set[str]:
    """The kinds of role of a head; "none" if it has none."""
    return {role["role"] for role in found} or {"none"}
