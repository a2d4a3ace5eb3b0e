"""Progress bars of reports that take long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


class Stages:
    """One bar for a report of several stages, with the time that is left for all of them.

    Args:
        total: texts that all stages run through the model, however often.
        show: None: where stderr is a terminal.
    """

    def __init__(self, total: int, show: bool | None):
        from tqdm import tqdm

        show = sys.stderr.isatty() if show is None else show
        self._bar = tqdm(total=total, unit="text", leave=False, disable=not show)

    def begin(self, label: str) -> None:
        self._bar.set_description(label)

    def done(self, texts: int) -> None:
        self._bar.update(texts)

    def close(self) -> None:
        self._bar.close()


def with_progress(
    items: Iterable[Any], total: int, label: str, unit: str, show: bool | None
) -> Iterator[Any]:
    """``items`` with a bar that shows the time left; ``show`` None: where stderr is a terminal."""
    from tqdm import tqdm

    show = sys.stderr.isatty() if show is None else show
    yield from tqdm(items, total=total, desc=label, unit=unit, leave=False, disable=not show)
