"""Two inputs side by side: which heads run for only one of them, and because of which words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Of a head's largest share: smaller ones are noise.
_LEAST = 0.1


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], words: int = 3
) -> list[dict[str, Any]]:
    """The heads that ran for one of two inputs of a ``headwise.explanation`` and not for the other.

    Args:
        first: one entry of the document's ``inputs``.
        second: another, of the same model.
        words: tokens to name for and against each head.

    Returns:
        A dictionary for each head, sorted by the distance of the margins: ``layer`` (its name),
        ``site``, ``head``, ``ran_for`` (0: the first, 1: the second), ``margins`` (of both; None if
        the gate has none), ``spoke_for`` (the tokens with the largest positive shares in the input
        that ran it, as (token, share)) and ``spoke_against`` (the tokens with the lowest negative
        shares in the other).

    Raises:
        ValueError: the inputs are not of one model.
    """
    shapes = [[(own["name"], own["num_heads"]) for own in one["layers"]] for one in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError("inputs must be of one model, but their layers or heads differ")
    found = []
    for mine, other in zip(first["layers"], second["layers"], strict=True):
        for pair in zip(mine["heads"], other["heads"], strict=True):
            if pair[0]["on"] == pair[1]["on"]:
                continue
            ran = 0 if pair[0]["on"] else 1
            inputs = (first, second)
            found.append(
                {
                    "layer": mine["name"],
                    "site": mine["site"],
                    "head": pair[0]["head"],
                    "ran_for": ran,
                    "margins": [head["margin"] for head in pair],
                    "spoke_for": _strongest(inputs[ran], pair[ran], words, 1.0),
                    "spoke_against": _strongest(inputs[1 - ran], pair[1 - ran], words, -1.0),
                }
            )
    return sorted(found, key=_apart, reverse=True)


def _apart(entry: dict[str, Any]) -> float:
    one, other = entry["margins"]
    return 0.0 if one is None or other is None else abs(one - other)


def _strongest(
    entry: Mapping[str, Any], head: Mapping[str, Any], words: int, sign: float
) -> list[tuple[str, float]]:
    shares, tokens = head["shares"], entry["tokens"]
    if not shares:
        return []
    names = tokens if tokens and len(tokens) == len(shares) else None
    order = sorted(range(len(shares)), key=lambda place: -sign * shares[place])
    least = _LEAST * max(abs(share) for share in shares)
    return [
        (names[place] if names else f"token {place}", shares[place])
        for place in order[:words]
        if sign * shares[place] > least
    ]
