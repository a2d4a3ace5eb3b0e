"""Intervals and distances: the few statistics that the study reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.959964


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, JASA 1927).

    Raises:
        ValueError: ``trials`` is not positive, or ``successes`` is not in [0, trials].
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes must be in [0, trials] and trials positive, got {successes} of {trials}"
        )
    rate = successes / trials
    scale = 1 + _Z**2 / trials
    centre = (rate + _Z**2 / (2 * trials)) / scale
    half = _Z * math.sqrt(rate * (1 - rate) / trials + _Z**2 / (4 * trials**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few independent values and its 95% interval by Student's t.

    The interval of a single value is the value: nothing is known of its spread.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must not be empty")
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, mean, mean
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _T_QUANTILES[count - 2] if count - 2 < len(_T_QUANTILES) else _Z
    half = quantile * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


def paired_difference(
    first: Tensor, second: Tensor, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``first - second`` and its 95% interval by a paired bootstrap over inputs.

    Args:
        first: [N], how often each input was right under one method (0 to 1; the mean over seeds).
        second: [N], the same inputs under the other.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    if first.shape != second.shape or first.dim() != 1 or first.numel() == 0:
        raise ValueError(
            "first and second must have the same shape [N], N > 0, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    difference = (first.double() - second.double()).unsqueeze(0)  # [1, N]
    mean, low, high, _ = torch.ops.headwise.paired_bootstrap(difference, resamples, seed)
    return mean.item(), low.item(), high.item()


def mean_jaccard_distance(chosen: Tensor, limit: int = 512, seed: int = 0) -> float:
    """Mean over pairs of inputs of 1 - |A and B| / |A or B|, A and B the sets of chosen heads.

    0: every input runs the same heads. Two empty sets count as equal.

    Args:
        chosen: bool [N, heads].
        limit: pairs are taken among at most so many inputs, drawn by ``seed``.
    """
    if len(chosen) < 2:
        return 0.0
    if len(chosen) > limit:
        generator = torch.Generator().manual_seed(seed)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:limit]]
    sets = chosen.double()  # [N, heads]
    both = sets @ sets.T  # [N, N]
    sizes = sets.sum(1)
    either = sizes[:, None] + sizes[None, :] - both
    similarity = torch.where(either > 0, both / either.clamp(min=1.0), torch.ones_like(both))
    pairs = len(sets) * (len(sets) - 1)
    return 1.0 - ((similarity.sum() - similarity.diagonal().sum()) / pairs).item()
