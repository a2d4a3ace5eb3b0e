"""Checks of arguments by type, each with one clear sentence."""

from __future__ import annotations

import os
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from headwise.io.printable import quoted


def check_number(name: str, value: Any) -> None:
    """Raises TypeError if ``value`` is not a real number (a tensor of one element is one)."""
    scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {quoted(value)}")


def check_whole_number(name: str, value: Any) -> None:
    """Raises TypeError if ``value`` is not a whole number; bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {quoted(value)}")


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError if ``value`` is not a ``torch.Tensor``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def checked_path(name: str, value: Any) -> Path:
    """``value`` as a path; raises TypeError if it is none."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {quoted(value)}")
    return Path(value)
