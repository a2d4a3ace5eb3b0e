"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headwise import _C
from headwise.io.checked import checked_path
from headwise.io.printable import path_called, printable

__all__ = ["checked_file", "existing_folder", "read_text", "write_atomic", "write_json"]


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file at ``path`` by ``content`` (text as UTF-8) atomically.

    It is written next to ``path``, synced to disk and renamed into place. A device such as
    ``/dev/stdout`` is written directly.

    Raises:
        OSError: it cannot be written (a full disk); the file at ``path`` is unchanged, and nothing
            else is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    _C.write_atomic(os.fspath(checked_file("path", path)), data)


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


def checked_file(name: str, path: str | os.PathLike) -> Path:
    """The file at ``path``, the value of the argument ``name``; it need not exist.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: no file can have this name.
        IsADirectoryError: it is a folder.
    """
    file = checked_path(name, path)
    if not os.fspath(path):
        raise ValueError(f"{name} must not be empty")
    if "\0" in os.fspath(path):
        raise ValueError(f"{name} must not hold a null character, got {path_called(path)}")
    try:
        folder = file.is_dir()
    except OSError as error:  # a name that is too long
        raise OSError(error.errno, error.strerror, printable(os.fspath(path), 200)) from None
    if folder:
        raise IsADirectoryError(
            f"{name} must be a file, got {path_called(path)}, which is a folder"
        )
    return file


def read_text(path: str | os.PathLike) -> str:
    """The text of the UTF-8 file at ``path``.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: the file is not UTF-8.
        OSError: it cannot be read; a folder is named as one.
    """
    data = checked_file("path", path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path_called(path)} is not UTF-8 text (byte {error.start})") from None


def write_json(path: str | os.PathLike, document: Any, indent: int | None = 1) -> None:
    """Writes ``document`` as JSON, as :func:`write_atomic` does.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
        OSError: as :func:`write_atomic`.
    """
    text = json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomic(path, text + "\n")
