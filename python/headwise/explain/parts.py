"""Finished parts of a long measurement, kept so that an interrupted one goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from headwise.io.files import write_json
from headwise.io.safetensors_files import load_safetensors, save_safetensors

Tensors = dict[str, Tensor]


class Parts:
    """Named sets of tensors in a folder, valid for one ``key`` (model, data, settings).

    Args:
        folder: where they are kept; None: nowhere, every part is computed.
        key: what decides the parts' content. Parts of another key are removed.
    """

    def __init__(self, folder: Path | None = None, key: dict[str, Any] | None = None):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "key.json"
        key = json.loads(json.dumps(key or {}))
        try:
            found = json.loads(stored.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != key:
            self.clear()
            write_json(stored, key)

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """The part of that name, computed where it is not there yet."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            try:
                return load_safetensors(path)
            except ValueError:  # not written by this class: computed again
                pass
        part = compute()
        save_safetensors(path, {key: value.contiguous() for key, value in part.items()})
        return part

    def clear(self) -> None:
        """Removes the parts."""
        if self.folder is not None:
            for kind in ("*.safetensors", "*.jsonl"):
                for path in self.folder.glob(kind):
                    path.unlink()


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
