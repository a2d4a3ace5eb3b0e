"""Whether two models differ in a metric that is not a mean over examples: F1, correlation, BLEU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.io.printable import quoted

__all__ = ["MetricDifference", "metric_difference"]

_MOST_RESAMPLES = 10_000_000  # as in the operators that resample


@dataclass(frozen=True)
class MetricDifference:
    """A metric of two models on the same examples.

    Attributes:
        first: of the first model.
        second: of the second.
        difference: first minus second.
        low: lower end of the difference's bootstrap interval.
        high: its upper end.
        p_value: two-sided, of no difference.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float


def metric_difference(
    metric: Callable[[Tensor, Tensor], float | Tensor],
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    *,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> MetricDifference:
    """The difference of any metric between two models, with a paired bootstrap over examples.

    The examples are drawn with replacement, the same ones for both models, and the metric is
    computed again on every draw (Koehn, EMNLP 2004, for BLEU). A mean over examples (accuracy, a
    loss) needs no such draws: :func:`headwise.analysis.ablate_heads` and ``headwise compare``
    resample its examples directly.

    Args:
        metric: ``(outputs [n, ...], targets [n, ...]) -> a number``, the larger the better.
        first: ``[N, ...]``, outputs of the first model for each example.
        second: ``[N, ...]``, outputs of the second for the same examples.
        targets: ``[N, ...]``, the right answers.
        resamples: R, of the bootstrap; the metric is computed 2 R + 2 times.
        confidence_level: of the interval, in (0, 1), by percentiles.
        seed: of the draws.

    Returns:
        The metric of both and the difference; p is twice the smaller of (1 + #{d* <= 0}) / (R + 1)
        and (1 + #{d* >= 0}) / (R + 1), at most 1 (Davison and Hinkley 1997, 4.2).

    Raises:
        ValueError: different numbers of examples, none, an option out of range, or a metric that is
            not finite.

    Example:
        >>> def recall(outputs, targets):
        ...     return (outputs[targets == 1] == 1).float().mean()
        >>> targets = torch.tensor([0, 1, 1, 1])
        >>> found = metric_difference(recall, targets, 1 - targets, targets, resamples=9)
        >>> found.difference
        1.0
    """
    count = len(targets)
    if not len(first) == len(second) == count or count == 0:
        raise ValueError(
            "first, second and targets must be of the same examples, at least one, got "
            f"{len(first)}, {len(second)} and {count}"
        )
    if not 1 <= resamples <= _MOST_RESAMPLES:
        raise ValueError(f"resamples must be in 1..{_MOST_RESAMPLES}, got {quoted(resamples)}")
    if not 0.0 < confidence_level < 1.0:
        raise ValueError(f"confidence_level must be in (0, 1), got {confidence_level}")

    def value(outputs: Tensor, right: Tensor) -> float:
        found = float(metric(outputs, right))
        if not math.isfinite(found):
            raise ValueError(
                f"metric must be finite on every resample of the examples, got {quoted(found)}"
            )
        return found

    whole = value(first, targets), value(second, targets)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=generator).to(targets.device)  # [N]
        right = targets[rows]
        draws.append(value(first[rows], right) - value(second[rows], right))
    drawn = torch.tensor(draws, dtype=torch.float64)  # [R]
    tail = (1 - confidence_level) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    extreme = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (1 + extreme) / (resamples + 1))
    return MetricDifference(*whole, whole[0] - whole[1], low, high, p_value)
