"""Whether two scores rank the heads alike: across metrics, seeds and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.io.display import Grid, Shown
from headwise.pruning.scores import HeadScores

__all__ = ["Agreement", "score_agreement"]


@dataclass(frozen=True)
class Agreement(Shown):
    """Rank correlations of scores.

    Attributes:
        labels: of the S scores.
        method: "spearman" or "kendall".
        value: float64 ``[S, S]``.
        low: float64 ``[S, S]``, lower end of the bootstrap interval.
        high: float64 ``[S, S]``, its upper end.
    """

    labels: list[str]
    method: str
    value: Tensor
    low: Tensor
    high: Tensor

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "first": self.labels[i],
                "second": self.labels[j],
                self.method: self.value[i, j].item(),
                "low": self.low[i, j].item(),
                "high": self.high[i, j].item(),
            }
            for i in range(len(self.labels))
            for j in range(i + 1, len(self.labels))
        ]

    def _grid(self) -> Grid:
        title = f"{self.method} rank correlation of scores"
        return Grid(
            title, self.labels, self.labels, self.value.tolist(), row_title="", column_title=""
        )

    def table(self) -> str:
        """One row and one column per score: ``0.71 [0.55, 0.82]``."""
        cells = [
            [
                f"{v:.2f} [{low:.2f}, {high:.2f}]" if i != j else "1"
                for j, (v, low, high) in enumerate(zip(*row, strict=True))
            ]
            for i, row in enumerate(
                zip(self.value.tolist(), self.low.tolist(), self.high.tolist(), strict=True)
            )
        ]
        width = max(len(cell) for row in [self.labels, *cells] for cell in row) + 2
        first = max(map(len, self.labels))
        lines = [" " * first + "".join(label.rjust(width) for label in self.labels)]
        for label, row in zip(self.labels, cells, strict=True):
            lines.append(label.ljust(first) + "".join(cell.rjust(width) for cell in row))
        return "\n".join(lines)


def score_agreement(
    scores: Mapping[str, HeadScores],
    method: str = "spearman",
    *,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Rank correlation of every two scores over the heads of all layers, with intervals.

    Spearman's rho, or Kendall's tau-b, which counts pairs of heads and is smaller for the same
    agreement. The intervals are percentiles over resampled heads. Scores are used as they are: if a
    small one means important (``entropy``), agreement with the others is negative.

    Args:
        scores: label -> scores, at least two: the result of :func:`headwise.score_heads`, or one
            metric for several seeds or tasks as labels.
        method: "spearman" or "kendall".
        resamples: of the bootstrap.
        confidence_level: of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two scores, scores of different heads, or scores that are not finite
            or all the same.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must map labels to HeadScores, got {type(scores).__name__}")
    if len(scores) < 2:
        raise ValueError(f"scores must be at least two, got {len(scores)}")
    shapes = {
        label: {name: len(values) for name, values in found.values.items()}
        for label, found in scores.items()
    }
    first = next(iter(shapes))
    for label, shape in shapes.items():
        if shape != shapes[first]:
            raise ValueError(f"scores must be of the same heads, got others in '{label}'")
    rows = torch.stack(
        [torch.cat([found.values[name] for name in shapes[first]]) for found in scores.values()]
    )  # [S, heads]
    found = torch.ops.headwise.rank_agreement(rows, method, resamples, seed, confidence_level)
    return Agreement(list(scores), method, *found)
