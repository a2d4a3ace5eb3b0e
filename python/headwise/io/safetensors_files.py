"""Tensors in safetensors files, read and written by the C++ core."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from headwise import _C
from headwise.io.files import checked_file

__all__ = ["load_safetensors", "read_safetensors_metadata", "save_safetensors"]


def save_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``tensors`` to ``path`` atomically.

    Args:
        path: the file; one that exists is replaced once the new one is complete.
        tensors: any shapes; float64, float32, float16, bfloat16, float8, bool, signed and unsigned
            integers, complex64. Views are written contiguous, other devices are copied.
        metadata: texts to store with them.

    Raises:
        TypeError: a dtype or layout that the format does not have.
        ValueError: a meta tensor, or a name that is ``"__metadata__"`` or holds a NUL character.
        OSError: it cannot be written (a full disk); the file at ``path`` is unchanged.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors must map names to tensors, got {type(tensor).__name__} at {name!r}"
            )
    _C.save_safetensors(os.fspath(checked_file("path", path)), dict(tensors), dict(metadata or {}))


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of the safetensors file at ``path``, on the CPU, by name.

    The file need not be trusted: it cannot make this read outside the file, or allocate more than
    the file's size.

    Raises:
        ValueError: the file breaks a rule of the format; the message names the tensor and the rule.
        OSError: it cannot be read.
    """
    return _C.load_safetensors(os.fspath(checked_file("path", path)))


def read_safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts stored with the tensors of ``path``; the header is checked, no tensor is read."""
    return _C.read_safetensors_metadata(os.fspath(checked_file("path", path)))
