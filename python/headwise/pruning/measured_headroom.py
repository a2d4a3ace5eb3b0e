"""Headroom: how much a choice by the input could gain over the best static plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.conversion import converted
from headwise.io.display import Shown, new_axes
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list
from headwise.nn.instrumenting import evaluating
from headwise.nn.intervention import example_losses
from headwise.pruning.bank import Bank, fit_bank, following, plan_choices
from headwise.pruning.scores import HeadScores

__all__ = ["Headroom", "HeadroomRow", "headroom"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Half the width of a 95% interval, in standard errors.
_Z = 1.96


@dataclass(frozen=True)
class Gain:
    """A mean difference between two models on the same inputs, with its 95% interval."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(one: Tensor, other: Tensor) -> Gain:
        """Of ``one`` over ``other``, values [N] of the same inputs."""
        difference = one.double() - other.double()
        error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        mean = difference.mean().item()
        return Gain(mean, mean - _Z * error, mean + _Z * error)


@dataclass(frozen=True)
class HeadroomRow:
    """The results at one budget, without training. Values are means of ``value_fn``.

    Attributes:
        keep: the share of the heads.
        static: one plan for all inputs, repaired.
        routed: a plan for each cluster, each repaired, picked by the router.
        ceiling: the same, picked by the input's true cluster: an upper bound for any router of
            these plans.
        swapped: picked by another input's cluster.
        lost: how much the static plan loses to the dense model.
        won: how much routing gains over the static plan.
        winnable: how much the ceiling gains over the static plan.
        own: how much an input's own plan gains over another input's.
    """

    keep: float
    static: float
    routed: float
    ceiling: float
    swapped: float
    lost: Gain
    won: Gain
    winnable: Gain
    own: Gain


@dataclass(frozen=True)
class Headroom(Shown):
    """The result of :func:`headroom`.

    Attributes:
        dense: the mean value of the dense model.
        rows: of each budget.
        plans: how many plans were tried.
        inputs: how many inputs the values are means of.
    """

    dense: float
    rows: list[HeadroomRow]
    plans: int
    inputs: int

    @property
    def worth_trying(self) -> list[float]:
        """The budgets at which choosing by the input clearly wins: the interval of ``won`` or of
        ``winnable`` is above 0, and so is that of ``own``."""
        return [
            row.keep
            for row in self.rows
            if max(row.won.low, row.winnable.low) > 0.0 and row.own.low > 0.0
        ]

    def sentences(self) -> list[str]:
        """The findings as sentences; values are shown as percentages."""
        found = []
        for row in self.rows:
            found.append(
                f"At {row.keep:.0%} of the heads one repaired plan is at {100 * row.static:.1f} "
                f"({-100 * row.lost.mean:+.1f} against dense, {100 * self.dense:.1f}); "
                f"{self.plans} plans routed by the input at {100 * row.routed:.1f} "
                f"({100 * row.won.mean:+.1f}, 95% {100 * row.won.low:+.1f} to "
                f"{100 * row.won.high:+.1f}), by the true cluster at {100 * row.ceiling:.1f}, "
                f"with another input's plan at {100 * row.swapped:.1f}."
            )
        worth = ", ".join(f"{keep:.0%}" for keep in self.worth_trying)
        found.append(
            f"Choosing by the input is worth trying at {worth} of the heads."
            if worth
            else "Choosing by the input is not worth trying on this data: prune statically."
        )
        return found

    def _records(self) -> list[dict[str, Any]]:
        gains = ("lost", "won", "winnable", "own")
        return [
            {
                "keep": row.keep,
                "dense": self.dense,
                **{name: getattr(row, name) for name in ("static", "routed", "ceiling", "swapped")},
                **{
                    name + end: getattr(getattr(row, name), part)
                    for name in gains
                    for part, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
                },
            }
            for row in self.rows
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The gain of choosing by the input over the static plan, with 95% intervals, by budget.

        Args:
            ax: matplotlib axes; None: new ones.
        """
        ax = new_axes(ax, (5.5, 3.6))
        keep = [row.keep for row in self.rows]
        for name, label in (
            ("won", "routed by the input"),
            ("winnable", "routed by the true cluster"),
        ):
            gains = [getattr(row, name) for row in self.rows]
            below = [gain.mean - gain.low for gain in gains]
            above = [gain.high - gain.mean for gain in gains]
            means = [gain.mean for gain in gains]
            ax.errorbar(keep, means, [below, above], marker="o", capsize=3, label=label)
        ax.axhline(0.0, color="grey", linewidth=1)
        ax.set(title="gain over one static plan", xlabel="share of the heads", ylabel="gain")
        ax.legend()
        return ax

    def _repr_html_(self) -> str:
        """The representation in a notebook."""
        return f"<p>{self.sentences()[-1]}</p>{super()._repr_html_()}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worth_trying": self.worth_trying}


def headroom(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    score_fn: Callable[[nn.Module, list[Any]], HeadScores],
    value_fn: Callable[[nn.Module, Any], Tensor],
    *,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    plans: int | None = None,
    clusters: Sequence[int] | Tensor | None = None,
    held_out_clusters: Sequence[int] | Tensor | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **bank: Any,
) -> Headroom:
    """How much the best static plan loses, and how much of that plans by the input win back.

    Nothing is trained, so this tells before any training whether a dynamic gate is worth it: for
    each ``keep`` one repaired plan (:func:`headwise.repair`) is compared with a bank of repaired
    plans (:func:`headwise.pruning.fit_bank`), picked by the router, by the true cluster, and by
    another input's cluster. Values of the same inputs are compared, so intervals are paired.

    Args:
        model: the dense model, converted or convertible, unchanged.
        batches: calibration data, as :func:`headwise.pruning.fit_bank` takes them.
        held_out: other data, on which values are computed.
        score_fn: as in :func:`headwise.pruning.fit_bank`.
        value_fn: ``(model, batch) -> [B]``: the quality, larger is better: 1 for a right answer, or
            minus the loss.
        keep: shares of the heads, in (0, 1].
        plans: number of plans of a bank; default: 4, or one for each cluster of ``clusters``, with
            which it must not be given.
        clusters: the domain or task of each calibration input; None: k-means.
        held_out_clusters: the same for each held-out input; None: its nearest cluster, so that the
            ceiling equals the router.
        forward_fn: as in :func:`headwise.repair`.
        seed: of k-means and of the swap.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.
        bank: further arguments of :func:`headwise.pruning.fit_bank`.

    Raises:
        ValueError: as :func:`headwise.pruning.fit_bank`; no held-out data, or values that are not
            one finite number for each input.
    """
    batches, held_out = batch_list(batches), batch_list(held_out, "held_out")
    if not held_out:
        raise ValueError("held_out must not be empty: there is nothing to compare models on")
    dense = converted(model)
    options = {"forward_fn": forward_fn, "seed": seed, "progress": False, **bank}
    base = _values(dense, held_out, value_fn)
    rows, count = [], 0
    for share in with_progress(list(keep), "headroom", "share", progress):
        static = fit_bank(dense, batches, score_fn, share, 1, **options)
        several = fit_bank(dense, batches, score_fn, share, plans, clusters=clusters, **options)
        count = len(several.plans)
        one = _values(static.model, held_out, value_fn)
        routed = _values(several.model, held_out, value_fn)
        true = _true_clusters(several, held_out, held_out_clusters, forward_fn)
        ceiling = _following(several, held_out, value_fn, true)
        other = true.roll(1)[
            torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))
        ]
        swapped = _following(several, held_out, value_fn, other)
        differ = other != true
        rows.append(
            HeadroomRow(
                share,
                one.double().mean().item(),
                routed.double().mean().item(),
                ceiling.double().mean().item(),
                swapped.double().mean().item(),
                Gain.of(base, one),
                Gain.of(routed, one),
                Gain.of(ceiling, one),
                Gain.of(ceiling[differ], swapped[differ]) if differ.any() else Gain(0.0, 0.0, 0.0),
            )
        )
    return Headroom(base.double().mean().item(), rows, count, len(base))


def _values(
    model: nn.Module, batches: list[Any], value_fn: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """float64 [N]."""
    with evaluating(model):
        return example_losses(model, batches, value_fn, "value")


def _true_clusters(
    bank: Bank,
    batches: list[Any],
    given: Sequence[int] | Tensor | None,
    forward_fn: Callable | None,
) -> Tensor:
    if given is None:
        chosen = [
            c.plan for b in batches for c in plan_choices(bank.model, b, forward_fn=forward_fn)
        ]
        return torch.tensor(chosen)
    true = torch.as_tensor(given, dtype=torch.long)
    if true.dim() != 1 or bool((true < 0).any()) or int(true.max()) >= len(bank.plans):
        raise ValueError(
            f"held_out_clusters must be numbers in 0..{len(bank.plans) - 1}, one for each input, "
            f"got shape {tuple(true.shape)}"
        )
    return true


def _following(bank: Bank, batches: list[Any], value_fn: Callable, plans: Tensor) -> Tensor:
    found, start = [], 0
    for batch in batches:
        with following(bank.model, plans[start:]):
            value = _values(bank.model, [batch], value_fn)
        found.append(value)
        start += len(value)
    if start != len(plans):
        raise ValueError(f"held_out_clusters must be of {start} inputs, got {len(plans)}")
    return torch.cat(found)
