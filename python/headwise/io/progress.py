"""Progress bars on stderr, for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Stages", "progress_bar", "with_progress"]

#: Seconds before a bar appears by default.
PATIENCE = 2.0

Item = TypeVar("Item")


def progress_bar(total: int | None, what: str, unit: str, show: bool | None) -> tqdm[Any]:
    """A bar that the caller updates and closes.

    Args:
        total: number of units; None: unknown.
        what: name of the work.
        unit: name of one unit.
        show: True: at once; None: after two seconds, in a terminal or a notebook; False: never.
    """
    from tqdm import tqdm

    hidden = not (_is_watched() if show is None else show)
    delay = PATIENCE if show is None else 0.0
    return tqdm(
        total=total, desc=what, unit=unit, leave=False, disable=hidden, delay=delay, file=sys.stderr
    )


def with_progress(
    items: Iterable[Item], what: str, unit: str, show: bool | None, total: int | None = None
) -> Iterator[Item]:
    """``items`` behind a :func:`progress_bar`; ``total`` by default their number, if they have
    one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(total, what, unit, show) as bar:
        for item in items:
            yield item
            bar.update()


class Stages:
    """One bar for a report of several stages, with the time left for all of them.

    Args:
        total: texts that all stages run through the model, however often.
        show: see :func:`progress_bar`.
    """

    def __init__(self, total: int, show: bool | None):
        self._bar = progress_bar(total, "", "text", show)

    def begin(self, label: str) -> None:
        self._bar.set_description(label)

    def done(self, texts: int) -> None:
        self._bar.update(texts)

    def close(self) -> None:
        self._bar.close()


def _is_watched() -> bool:
    """Whether stderr is a terminal or a notebook's."""
    stream = sys.stderr
    notebook = type(stream).__module__.startswith("ipykernel")
    return notebook or bool(getattr(stream, "isatty", lambda: False)())
