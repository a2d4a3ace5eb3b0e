"""Checks of gates' options: each takes a name and a value, and returns the value or refuses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Check = Callable[[str, Any], Any]


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")


def fraction(name: str, value: float) -> float:
    _number(name, value)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return float(value)


def unit(name: str, value: float) -> float:
    _number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return float(value)


def positive(name: str, value: float) -> float:
    _number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def not_negative(name: str, value: float) -> float:
    _number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)


def finite(name: str, value: float) -> float:
    _number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def moment(name: str, value: float) -> float:
    """A progress from which something holds; above 1: never."""
    _number(name, value)
    if not value >= 0.0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return float(value)


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def at_least(least: int) -> Check:
    """A whole number, ``least`` or more."""

    def check(name: str, value: int) -> int:
        _number(name, value)
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value}")
        if value < least:
            rule = "not be negative" if least == 0 else f"be at least {least}"
            raise ValueError(f"{name} must {rule}, got {value}")
        return int(value)

    return check


def choice(*choices: str) -> Check:
    def check(name: str, value: str) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what ``check`` accepts."""
    return lambda name, value: None if value is None else check(name, value)
