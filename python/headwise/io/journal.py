"""Searches that can be interrupted: every finished step is a line of a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Journal"]

_FORMAT = "headwise.journal"


class Journal:
    """Finished steps of a search by name, kept in a file of JSON lines.

    The first line says what is searched and with what settings; each other line is one finished
    step. A line that an interruption cut short is dropped, so a resumed search never continues from
    half a step.

    Args:
        path: the file; None: nothing is kept. A file that is there is resumed.
        search: what is searched.
        settings: what the steps depend on; JSON can hold it.

    Raises:
        ValueError: the file is no journal, or one of another search or of other settings.

    Example:
        >>> journal = Journal(None, "ablation", {"seed": 0})
        >>> journal.add("layer.0/3", [0.25, 0.5])
        >>> journal.get("layer.0/3")
        [0.25, 0.5]
    """

    def __init__(self, path: str | os.PathLike | None, search: str, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._steps: dict[str, Any] = {}
        if self._path is None:
            return
        head = {"format": _FORMAT, "version": 1, "search": search, "settings": settings}
        if self._path.exists() and self._path.stat().st_size > 0:
            self._resume(json.loads(json.dumps(head)))
        else:
            self._write("w", head)

    @property
    def path(self) -> Path | None:
        """The file, or None."""
        return self._path

    def get(self, step: str) -> Any:
        """What was kept of a step, or None."""
        return self._steps.get(step)

    def add(self, step: str, result: Any) -> None:
        """Keeps a finished step (a later result of the same step replaces the earlier).

        Raises:
            ValueError: a number that is not finite.
            OSError: the file cannot be written.
        """
        self._steps[step] = result
        if self._path is not None:
            self._write("a", [step, result])

    def __len__(self) -> int:
        return len(self._steps)

    def _write(self, mode: str, line: Any) -> None:
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        with open(self._path, mode, encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _resume(self, head: dict[str, Any]) -> None:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        found = self._parse(lines[0], 1) if lines else None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"'{self._path}' is not a journal of a search")
        for key in ("version", "search"):
            if found.get(key) != head[key]:
                raise ValueError(
                    f"'{self._path}' is a journal of {key} {found.get(key)!r}, not {head[key]!r}"
                )
        there = found.get("settings") if isinstance(found.get("settings"), dict) else {}
        for key in sorted(head["settings"].keys() | there.keys()):
            if there.get(key) != head["settings"].get(key):
                raise ValueError(
                    f"'{self._path}' is a journal of a search with {key}={there.get(key)!r}, not "
                    f"{head['settings'].get(key)!r}: remove it or give another file"
                )
        for number, line in enumerate(lines[1:], 2):
            step = self._parse(line, number)
            if not isinstance(step, list) or len(step) != 2 or not isinstance(step[0], str):
                raise ValueError(f"line {number} of '{self._path}' is not a step of a search")
            self._steps[step[0]] = step[1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))

    def _parse(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} of '{self._path}' is not JSON") from None
