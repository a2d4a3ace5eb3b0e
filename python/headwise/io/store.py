"""Unfinished work: finished steps are saved in a file, and the same call resumes from there."""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.io.files import write_atomic
from headwise.io.fingerprint import fingerprint
from headwise.io.printable import printable, quoted

__all__ = ["Store", "file_in", "locked", "short_name"]

_FORMAT, _VERSION = "headwise.unfinished", 1


class Store:
    """Finished steps of some work by name, in a file of JSON lines.

    The first line identifies the work and its key; each further line is one finished step with a
    checksum. A line that is not a finished step of this work (cut short by an interruption or a
    full disk, or written by something else) is ignored, so every finished step survives and nothing
    else is mistaken for one.

    Args:
        path: the file; None: nothing is saved. An existing file is resumed.
        work: name of the work.
        key: everything that the steps depend on, as JSON values. For models and data, use their
            :func:`headwise.io.fingerprint.fingerprint`.

    Raises:
        ValueError: the file is something else, or is of other work or another key (named).
        OSError: it cannot be written.

    Example:
        >>> store = Store(None, "ablation", {"seed": 0})
        >>> store.add("layer.0/3", [0.25, 0.5])
        >>> store.get("layer.0/3")
        [0.25, 0.5]
    """

    def __init__(self, path: str | os.PathLike | None, work: str, key: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._steps: dict[str, Any] = {}
        if self._path is None:
            return
        head = {"format": _FORMAT, "version": _VERSION, "work": work, "key": key}
        line = _line(head)
        data = self._path.read_bytes() if self._path.exists() else b""
        if line.startswith(data):  # nothing, or not even the first line was finished
            write_atomic(self._path, line)
            return
        self._check(data.split(b"\n", 1)[0], json.loads(line))
        for text in data.split(b"\n")[1:]:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                name, value, check = json.loads(text)
                if isinstance(name, str) and check == _check_sum(name, value):
                    self._steps[name] = value
        # The next line must not be appended to a line that was cut short.
        self._begin = b"" if data.endswith(b"\n") else b"\n"

    _begin = b""

    @classmethod
    def in_folder(
        cls, folder: str | os.PathLike | None, name: str, key: dict[str, Any], *, only: bool = False
    ) -> Store:
        """A store whose file, in ``folder``, is named after ``name`` and ``key``, so that work of
        another key has another file.

        Args:
            folder: created if it does not exist; None: nothing is saved.
            name: of the work.
            key: as above.
            only: files of the same work and another key are removed.
        """
        if folder is None:
            return cls(None, name, key)
        path = file_in(folder, name, key, only=only)
        try:
            return cls(path, name, key)
        except ValueError:  # of that name, but not of this class
            path.unlink()
            return cls(path, name, key)

    @property
    def path(self) -> Path | None:
        """The file, or None."""
        return self._path

    def get(self, name: str) -> Any:
        """The saved result of a step, or None."""
        return self._steps.get(name)

    def add(self, name: str, value: Any) -> None:
        """Saves a finished step (a later result of the same step replaces the earlier).

        Raises:
            ValueError: a number that is not finite.
            OSError: the file cannot be written; earlier steps are still in it.
        """
        if self._path is not None:
            text = json.dumps([name, value], allow_nan=False)
            value = json.loads(text)[1]  # as it will be read
            self._append(_line([name, value, _check_sum(name, value)]))
        self._steps[name] = value

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a step, computed and saved if they are not there yet."""
        kept = self.get(name)
        if kept is not None:
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                return {key: _unpacked(*value) for key, value in kept.items()}
        found = compute()
        if self._path is not None:
            self.add(name, {key: _packed(value) for key, value in found.items()})
        return found

    def __len__(self) -> int:
        return len(self._steps)

    def _append(self, line: bytes) -> None:
        assert self._path is not None
        with open(self._path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                whole = self._begin + line
                if file.write(whole) < len(whole):  # the disk is full
                    file.write(whole[file.tell() - end :])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self._begin = b""

    def _check(self, line: bytes, head: dict[str, Any]) -> None:
        where = f"'{printable(str(self._path), 200)}'"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"{where} is not a file of unfinished work: give another one")
        for name in ("version", "work"):
            if found.get(name) != head[name]:
                raise ValueError(
                    f"{where} is of {name} {quoted(found.get(name))}, not {quoted(head[name])}: "
                    "give another file"
                )
        kept = found.get("key")
        there: dict = kept if isinstance(kept, dict) else {}
        for name in sorted(head["key"].keys() | there.keys()):
            if there.get(name) != head["key"].get(name):
                raise ValueError(
                    f"{where} is of {head['work']} with {printable(name, 40)}="
                    f"{quoted(there.get(name))}, not {quoted(head['key'].get(name))}: remove it or "
                    "give another file"
                )


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _check_sum(name: str, value: Any) -> str:
    text = json.dumps([name, value], allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _packed(tensor: Tensor) -> list[Any]:
    """A tensor as JSON: dtype, shape and its bytes in base 64."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    name = str(tensor.dtype).removeprefix("torch.")
    return [name, list(tensor.shape), base64.b64encode(data).decode("ascii")]


def _unpacked(dtype: str, shape: list[int], data: str) -> Tensor:
    flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8) if data else None
    kind = getattr(torch, dtype)
    return torch.empty(shape, dtype=kind) if flat is None else flat.view(kind).reshape(shape)


def file_in(
    folder: str | os.PathLike, name: str, key: dict[str, Any], *, only: bool = False
) -> Path:
    """The file of :meth:`Store.in_folder`, for work that opens its own store."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = fingerprint(json.dumps(key, sort_keys=True))
    path = folder / f"{short_name(name)}-{digest}.jsonl"
    for other in folder.glob(f"{glob.escape(short_name(name))}-{'[0-9a-f]' * 32}.jsonl"):
        if only and other != path:
            other.unlink()
    return path


def short_name(name: str, most: int = 80) -> str:
    """``name`` as part of a file's name: at most ``most`` bytes, and without a slash. A shortened
    one ends in a part of its fingerprint, so that names stay different."""
    safe = name.replace("/", "_").replace("\0", "_")
    if safe == name and len(name.encode("utf-8", "replace")) <= most:
        return name
    kept = safe.encode("utf-8", "ignore")[: most - 13].decode("utf-8", "ignore")
    return f"{kept}-{fingerprint(name)[:12]}"


@contextlib.contextmanager
def locked(folder: str | os.PathLike | None) -> Iterator[None]:
    """Locks a folder for one run at a time; creates it if it does not exist. None: does nothing.

    The lock is the operating system's: it ends with its process, however that ends.

    Raises:
        RuntimeError: another run uses the folder.
        OSError: it cannot be made.
    """
    if folder is None:
        yield
        return
    import fcntl

    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another run is using the folder '{printable(str(folder), 300)}': wait until it "
                "has ended, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
