"""Alternating timing of contenders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

#: ``process`` counts the processor time of all threads: for shared machines.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
WARM_UP = 2  #: rounds that are not timed
LEAST_ROUNDS = 3  #: that are timed, however long they take


@dataclass(frozen=True)
class Timer:
    """How contenders are timed.

    Attributes:
        rounds: timed rounds, after two that are not.
        clock: a key of :data:`CLOCKS`.
        most_seconds: no further round after this time; at least three are run. None: no limit.
    """

    rounds: int
    clock: str
    device: torch.device
    most_seconds: float | None = None

    def measure(
        self,
        runs: Mapping[str, Callable[[], object]],
        before: Callable[[str], object] | None = None,
    ) -> Times:
        """Every contender once per round, alternating.

        Args:
            before: called with the name of each contender before its call, not timed.
        """
        now, cuda = CLOCKS[self.clock], self.device.type == "cuda"
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        began = time.perf_counter()
        for turn in range(self.rounds + WARM_UP):
            if self.most_seconds is not None and turn >= WARM_UP + LEAST_ROUNDS:
                if time.perf_counter() - began > self.most_seconds:
                    break
            for name, run in runs.items():
                if before is not None:
                    before(name)
                begin = now()
                run()
                if cuda:
                    torch.cuda.synchronize(self.device)
                if turn >= WARM_UP:
                    seconds[name].append(now() - begin)
        return Times(seconds)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles of some values."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


@dataclass(frozen=True)
class Times:
    """Seconds of each round, a list for each contender."""

    seconds: Mapping[str, Sequence[float]]

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Median and quartiles of each contender."""
        return {
            name: quartiles([1e3 * value for value in found])
            for name, found in self.seconds.items()
        }

    def ratio(self, name: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Median and quartiles, over the rounds, of ``name``'s time over a weighted sum of others.

        The times of one round are divided, because they have the same noise.
        """
        rounds = range(len(self.seconds[name]))
        whole = [sum(share * self.seconds[own][i] for own, share in parts.items()) for i in rounds]
        # A clock may not advance during a short call.
        floor = 1e-9
        return quartiles([max(self.seconds[name][i], floor) / max(whole[i], floor) for i in rounds])

    def fastest(self, names: Sequence[str]) -> str:
        """The one of ``names`` with the smallest median."""
        return min(names, key=lambda name: statistics.median(self.seconds[name]))


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line through points: slope, intercept, and the share of variance that it
    explains."""
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    total = sum((value - mean) ** 2 for value in y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return {
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1 - left / total if total > 0 else 1.0,
    }
