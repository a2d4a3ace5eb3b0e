"""The display of a running study: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

#: Seconds between two lines about the same training, without a terminal.
EVERY = 30.0


class Progress:
    """Receives every stage, training step and finished run.

    On a terminal the current stage is one line that changes. Elsewhere (a log file, a pipe)
    everything is a separate line, without control characters.

    Args:
        show: whether to print anything.
    """

    def __init__(self, show: bool = True):
        self._show = show
        self._terminal = show and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._label = ""
        self._steps = self._step = 0
        self._total = self._done = 0
        self._since = self._began = self._said = time.perf_counter()

    def start(self, runs: int) -> None:
        """``runs``: how many there are, finished ones included."""
        self._total, self._done = runs, 0

    def stage(self, label: str) -> None:
        """Something without countable steps begins."""
        if self._terminal:
            sys.stderr.write(f"\r\033[K{label} ...")
            sys.stderr.flush()
        else:
            self._say(label)

    def say(self, sentences: list[str]) -> None:
        """What was found before the runs begin."""
        self._clear()
        for sentence in sentences:
            self._say(sentence)

    def begin_training(self, label: str, steps: int) -> None:
        """A training of ``steps`` steps begins."""
        self._clear()
        self._label, self._steps, self._step = label, steps, 0
        self._began = self._said = time.perf_counter()
        if not steps or not self._show:
            return
        if self._terminal:
            self._bar = tqdm(total=steps, desc=label, unit="step", leave=False, file=sys.stderr)
        else:
            self._say(f"{label}: {steps} steps")

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()
            return
        self._step += 1
        now = time.perf_counter()
        if self._steps and not self._terminal and now - self._said >= EVERY:
            self._said = now
            left = (now - self._began) / self._step * max(0, self._steps - self._step)
            self._say(f"{self._label}: step {self._step} of {self._steps}, {left:.0f} s left")

    def end_training(self) -> None:
        self._steps = 0
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def finished(self, name: str, record: dict) -> None:
        """A run is finished and stored."""
        self._line(record, f"{time.perf_counter() - self._since:.0f} s")

    def taken_over(self, name: str, record: dict) -> None:
        """A run was finished before."""
        self._line(record, "finished before")

    def _line(self, record: dict, how: str) -> None:
        self._done += 1
        self._since = time.perf_counter()
        self._clear()
        self._say(
            f"[{self._done}/{self._total}] {record['task']}, seed {record['seed']}: "
            f"{record['title']}"
            + (f" at {record['keep_target']:.0%}" if record["kind"] != "dense" else "")
            + f": {record['accuracy']:.1%} with {record['heads_mean']:.1%} of heads ({how})"
        )

    def _say(self, line: str) -> None:
        if self._show:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\033[K")
