"""Files that are whole or absent, and the finished runs of a study among them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.apps.tasks.errors import UsageError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a path beside ``path``, then renames: nothing half-written is left.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(beside))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def write_text(path: Path, content: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_atomically(path, lambda beside: beside.write_text(content, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """JSON that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def writable_folder(path: Path) -> Path:
    """Makes the folder, and a file in it to see that one can.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the folder {path}: {error.strerror}") from None
    return path


class RunStore:
    """The finished runs of a study, a JSON file each.

    A run is found again only if everything that decides its result is the same: its ``key``
    (settings, data, versions) is stored with it and compared.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def find(self, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a finished run, or None where it has to be done (again)."""
        try:
            stored = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(stored, dict) or stored.get("key") != json.loads(json.dumps(key)):
            return None
        return stored.get("record")

    def keep(self, name: str, key: dict[str, Any], record: dict[str, Any]) -> None:
        """Writes a finished run."""
        write_json(self._path(name), {"key": key, "record": record})
