"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from typing import Any

from headwise import _C

__all__ = ["write_atomic", "write_json"]


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file at ``path`` by ``content`` (text as UTF-8) atomically.

    It is written next to ``path``, synced to disk and renamed into place. A device such as
    ``/dev/stdout`` is written directly.

    Raises:
        OSError: it cannot be written (a full disk); the file at ``path`` is unchanged, and nothing
            else is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    _C.write_atomic(os.fspath(path), data)


def write_json(path: str | os.PathLike, document: Any, indent: int | None = 1) -> None:
    """Writes ``document`` as JSON, as :func:`write_atomic` does.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
        OSError: as :func:`write_atomic`.
    """
    text = json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomic(path, text + "\n")
