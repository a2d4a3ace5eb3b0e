"""Comparisons that fail with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def holds(condition: Any, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def equal(what: str, got: Tensor | None, expected: Tensor | None, tolerance: float = 0.0) -> None:
    """Both None, or the same shape and dtype and values within ``tolerance`` (both relative and
    absolute)."""
    holds((got is None) == (expected is None), f"{what}: one of the two is None")
    if got is None or expected is None:
        return
    try:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise AssertionError(f"{what}: {reason}") from None


def raises(what: str, kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{what} must raise {kind.__name__}")
