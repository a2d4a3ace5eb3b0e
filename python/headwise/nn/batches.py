"""Batches of whatever a model takes: mappings, tuples and lists of tensors, or one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from headwise.io.printable import quoted


def check_batches(batches: Any, name: str = "batches") -> None:
    """Raises TypeError for what is no iterable of batches; a mapping would give its keys."""
    if isinstance(batches, Mapping):
        raise TypeError(f"{name} must be a list of batches, got one mapping: put it into a list")
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(f"{name} must be a list of batches or an iterator, got {quoted(batches)}")


def batch_list(batches: Any, name: str = "batches") -> list[Any]:
    """The batches of an iterable; see :func:`check_batches`."""
    check_batches(batches, name)
    return list(batches)


def call_model(model: nn.Module, batch: Any) -> Any:
    """``model`` called with a batch: a mapping's items as keyword arguments, those of a tuple or
    list as positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def run_model(model: nn.Module, batch: Any) -> Any:
    """The default ``forward_fn``: the result of :func:`call_model`, or its ``logits``."""
    output = call_model(model, batch)
    return getattr(output, "logits", output)


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        TypeError: it has no tensor.
    """
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values if isinstance(batch, (Mapping, tuple, list)) else ():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise TypeError(f"batches must hold tensors, got {type(batch).__name__}")


def take_rows(inputs: Any, rows: Tensor) -> Any:
    """Rows of the first dimension of every tensor in a mapping, tuple, list or tensor."""
    if isinstance(inputs, Tensor):
        return inputs.index_select(0, rows.to(inputs.device)) if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {name: take_rows(value, rows) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(take_rows(value, rows) for value in inputs)
    return inputs
