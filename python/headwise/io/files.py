"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headwise import _C
from headwise.io.checked import checked_path
from headwise.io.printable import path_called

__all__ = ["existing_folder", "write_atomic", "write_json"]


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


def existing_folder(name: str, path: str | os.PathLike) -> Path:
    """The folder at ``path``, the value of the argument ``name``.

    Raises:
        TypeError: ``path`` is not a path.
        FileNotFoundError: it is none; a name that the system does not take is none.
    """
    folder = checked_path(name, path)
    try:
        found = folder.is_dir()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise FileNotFoundError(
            f"{name} must be a folder, got {path_called(path)}, which is not one"
        )
    return folder


def write_json(path: str | os.PathLike, document: Any, indent: int | None = 1) -> None:
    """Writes ``document`` as JSON, as :func:`write_atomic` does.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
        OSError: as :func:`write_atomic`.
    """
    text = json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomic(path, text + "\n")
