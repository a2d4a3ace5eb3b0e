"""Text of unknown origin (file names, labels, cells) on its way to a terminal or into an error."""

from __future__ import annotations

from typing import Any

__all__ = ["printable", "quoted"]


def printable(text: str, most: int = 1000) -> str:
    """``text`` without control characters (escaped instead) and at most ``most`` letters long.

    Control characters could rewrite what a terminal shows; characters that print nothing (the
    marks that reverse the direction of writing, half surrogate pairs) are escaped too.
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text[: most + 1]
    )
    return shown if len(shown) <= most and len(text) <= most else shown[:most] + "…"


def quoted(value: Any, most: int = 60) -> str:
    """``repr(value)`` for an error message, at most ``most`` letters long."""
    # The repr of a long string or list need not be built to be cut.
    if isinstance(value, str | bytes):
        whole = len(value) <= most
        return repr(value) if whole else repr(value[:most]) + "…"
    return printable(repr(value), most)
