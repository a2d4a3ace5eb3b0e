"""What a person sees while a study runs: bars on a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Hears of every stage, training step and finished run.

    Args:
        show: whether to say anything at all.
    """

    def __init__(self, show: bool = True):
        self._show = show
        self._terminal = show and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._total = self._done = 0
        self._since = time.perf_counter()

    def start(self, runs: int) -> None:
        """``runs``: how many there are, finished ones included."""
        self._total, self._done = runs, 0

    def stage(self, label: str) -> None:
        """Something without countable steps begins."""
        if self._terminal:
            sys.stderr.write(f"\r\033[K{label} ...")
            sys.stderr.flush()

    def say(self, sentences: list[str]) -> None:
        """What was found before the runs begin."""
        if self._show:
            self._clear()
            sys.stderr.write("".join(f"{sentence}\n" for sentence in sentences))
            sys.stderr.flush()

    def begin_training(self, label: str, steps: int) -> None:
        """A training of ``steps`` steps begins."""
        self._clear()
        if self._terminal and steps:
            self._bar = tqdm(total=steps, desc=label, unit="step", leave=False, file=sys.stderr)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def end_training(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def finished(self, name: str, record: dict) -> None:
        """A run is finished and stored."""
        self._line(record, f"{time.perf_counter() - self._since:.0f} s")

    def taken_over(self, name: str, record: dict) -> None:
        """A run was found finished."""
        self._line(record, "finished before")

    def _line(self, record: dict, how: str) -> None:
        self._done += 1
        self._since = time.perf_counter()
        if not self._show:
            return
        self._clear()
        sys.stderr.write(
            f"[{self._done}/{self._total}] {record['task']}, seed {record['seed']}: "
            f"{record['title']}"
            + (f" at {record['keep_target']:.0%}" if record["kind"] != "dense" else "")
            + f": {record['accuracy']:.1%} with {record['heads_mean']:.1%} of heads ({how})\n"
        )
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\033[K")
