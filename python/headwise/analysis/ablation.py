"""Ablation: what a model loses without one head, or with only one head in a layer.

Which one should you use? ``ablate_heads`` measures what :func:`headwise.score_heads` estimates from
a gradient, at the cost of one evaluation per head, and tests which differences are more than
chance. ``keep_one_head`` tests whether a layer needs more than one head at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.conversion import converted
from headwise.io.progress import with_progress
from headwise.io.store import Store
from headwise.nn.batches import batch_list
from headwise.nn.instrumenting import instrument, scaled_heads
from headwise.nn.intervention import (
    LossFunction,
    contents_of,
    example_losses,
)
from headwise.pruning.scores import HeadScores

__all__ = ["Ablation", "ablate_heads", "keep_one_head"]


@dataclass(frozen=True)
class Ablation:
    """What heads are worth, measured.

    Attributes:
        scores: the larger, the more a head is worth; see the function that returned it.
        low: layer name -> float64 ``[H]``, lower end of the score's bootstrap interval.
        high: layer name -> float64 ``[H]``, its upper end.
        p_value: layer name -> float64 ``[H]``, two-sided, of the score being 0.
        losses: float64 ``[N]``, of the whole model on every example.
    """

    scores: HeadScores
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    p_value: Mapping[str, Tensor]
    losses: Tensor

    def significant(self, level: float = 0.01) -> list[tuple[str, int]]:
        """(layer, head) of the scores that differ from 0 with p < ``level``, in model order."""
        return [
            (name, head)
            for name, values in self.p_value.items()
            for head, p in enumerate(values.tolist())
            if p < level
        ]


def all_but(heads: int, head: int) -> Tensor:
    """The factors of a layer's heads that remove one, ``[H]``."""
    factors = torch.ones(heads)
    factors[head] = 0.0
    return factors


def only(heads: int, head: int) -> Tensor:
    """The factors of a layer's heads that leave one, ``[H]``."""
    return 1.0 - all_but(heads, head)


def each_head(
    scales: dict[str, Tensor],
    factors: Callable[[int, int], Tensor],
    title: str,
    progress: bool | None = None,
) -> Iterator[tuple[str, int]]:
    """Every (layer, head) of the model; while the caller measures it, the layer's heads have the
    factors.

    Args:
        scales: of :func:`headwise.nn.instrumenting.scaled_heads`.
        factors: (heads of the layer, head) -> ``[H]``, such as :func:`all_but`.
        title: of the progress bar.
    """
    heads = [(name, head) for name, scale in scales.items() for head in range(len(scale))]
    for name, head in with_progress(heads, title, "head", progress):
        whole = scales[name]
        scales[name] = factors(len(whole), head).to(whole)
        yield name, head
        scales[name] = whole


def ablate_heads(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
    journal: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Ablation:
    """What the model loses when one head is removed, for every head.

    Michel et al. 2019 (arXiv 1905.10650), section 3.2. The score of a head is the mean over the
    examples of loss without it minus loss with it: below 0, the model is better off without. Its
    interval and p-value are by paired bootstrap over the examples, as in the paper (there 1,000
    resamples and p < 0.01, on one side: half of ours).

    Costs one evaluation of the data per head. With a journal, an interrupted run resumes.

    Args:
        model: a converted or convertible model, run in evaluation mode and restored. Heads that its
            gates do not choose have score 0.
        batches: input of ``loss_fn``; read once and kept.
        loss_fn: ``(model, batch) -> [B]``, one loss per example, the smaller the better; the error
            (0 or 1) measures accuracy.
        resamples: of the bootstrap.
        confidence_level: of the intervals.
        seed: of the bootstrap.
        journal: checkpoint file.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no batches, a loss that is not finite or not one per example, or one that no
            head changes; a journal of another model, of other data or of another search.
    """

    return _ablate(
        "ablation", all_but, 1.0, model, batches, loss_fn,
        resamples, confidence_level, seed, journal, progress,
    )  # fmt: skip


def keep_one_head(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
    journal: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Ablation:
    """What the model loses when a layer has one head only, for every head of every layer.

    Michel et al. 2019, section 3.3 ("all heads but one"); the other layers are complete. The score
    of a head is the mean loss of the whole model minus the mean loss with only this head in its
    layer, so the best head of a layer has the largest score; near 0, it could replace the whole
    layer. Arguments, interval, p-value and errors as in :func:`ablate_heads`.
    """

    return _ablate(
        "all-but-one", only, -1.0, model, batches, loss_fn,
        resamples, confidence_level, seed, journal, progress,
    )  # fmt: skip


def _ablate(
    metric,
    factors,
    sign,
    model,
    batches,
    loss_fn,
    resamples,
    confidence_level,
    seed,
    journal,
    progress,
) -> Ablation:
    model = converted(model)
    batches = batch_list(batches)
    measured = LossesByIntervention(metric, model, batches, loss_fn, journal)
    with instrument(model) as opened:
        scales = scaled_heads(opened)
        full = measured.full()  # [N]
        losses = [
            measured(f"{name}/{head}")
            for name, head in each_head(scales, factors, metric, progress)
        ]
    if not losses:
        raise ValueError("model must have heads, got attention layers without any")
    difference = sign * (torch.stack(losses) - full)  # [heads, N]
    if not difference.any():
        raise ValueError(
            f"{metric} is zero for every head: the loss does not depend on the heads, or is too "
            "coarse to show it"
        )
    statistics = torch.ops.headwise.paired_bootstrap(difference, resamples, seed, confidence_level)
    sizes = [len(scale) for scale in scales.values()]
    mean, low, high, p = (dict(zip(scales, s.split(sizes), strict=True)) for s in statistics)
    return Ablation(HeadScores(metric, mean), low, high, p, full)


class LossesByIntervention:
    """Losses of every example, under named interventions; finished ones are saved."""

    def __init__(
        self,
        search: str,
        model: nn.Module,
        batches: list[Any],
        loss_fn: LossFunction,
        journal: str | os.PathLike | None,
    ) -> None:
        settings = {} if journal is None else contents_of(model, batches)
        self._journal = Store(journal, search, settings)
        self._path = journal
        self._measure = lambda: example_losses(model, batches, loss_fn)

    def full(self) -> Tensor:
        """``[N]``, without an intervention; a journal must have the same."""
        losses, kept = self._measure(), self._journal.get("full")
        if kept is None:
            self._journal.add("full", losses.tolist())
            return losses
        before = torch.tensor(kept, dtype=torch.float64)
        if before.shape != losses.shape or not torch.allclose(before, losses, 1e-4, 1e-6):
            raise ValueError(
                f"'{self._path}' is of another loss: the whole model's losses differ; "
                "remove it or give another file"
            )
        return before

    def __call__(self, name: str) -> Tensor:
        """``[N]``, under the current intervention."""
        kept = self._journal.get(name)
        if kept is not None:
            return torch.tensor(kept, dtype=torch.float64)
        losses = self._measure()
        self._journal.add(name, losses.tolist())
        return losses
