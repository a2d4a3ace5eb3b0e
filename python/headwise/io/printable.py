"""Making text of unknown origin (file names, labels, cells) safe for a terminal or an error."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["layer_called", "path_called", "printable", "quoted"]


def printable(text: str, most: int = 1000) -> str:
    """``text`` without control characters (escaped instead) and at most ``most`` letters long.

    Control characters could rewrite a terminal's output; other unprintable characters (marks that
    change the writing direction, half surrogate pairs) are escaped too.
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text[: most + 1]
    )
    return shown if len(shown) <= most and len(text) <= most else shown[:most] + "…"


def quoted(value: Any, most: int = 60) -> str:
    """``repr(value)`` for an error message, at most ``most`` letters long."""
    # Avoids building the repr of a long string or list only to cut it.
    if isinstance(value, str | bytes):
        whole = len(value) <= most
        return repr(value) if whole else repr(value[:most]) + "…"
    return printable(repr(value), most)


def layer_called(name: str) -> str:
    """A layer in a message; ``""`` is the name of a model that is itself a layer."""
    return f"layer '{printable(name, 100)}'" if name else "the layer"


def path_called(path: str | os.PathLike) -> str:
    """A path in quotes, for a message."""
    return f"'{printable(os.fspath(path), 200)}'"
