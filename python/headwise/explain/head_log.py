"""Head use during training, for TensorBoard or any scalar logger."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.explain.tracing import Trace, trace
from headwise.nn.layers import attention_layers

__all__ = ["HeadLog", "log_heads"]

_ops = torch.ops.headwise

#: Pixels per head in the picture of all heads.
_CELL = 8


class HeadLog:
    """Writes the head use of a model while it trains; made by :func:`log_heads`.

    Also a context manager, which removes it at the end of the block.
    """

    def __init__(
        self, writer: Any, model: nn.Module, step: Callable[[], int] | None, every: int, tag: str
    ):
        self._writer = writer
        self._step = step
        self._every = every
        self._tag = tag
        self._forwards = 0
        self._last: int | None = None
        self._recording: tuple[int, AbstractContextManager[Trace], Trace] | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before),
            # Also after an exception: hooks must be removed.
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Stops writing, and removes the hooks from the model."""
        self._stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> HeadLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> HeadLog:
        return _silent()

    def __reduce__(self) -> tuple:
        # A copy of the model, or a file of it, does not write to this log.
        return _silent, ()

    def _stop(self) -> tuple[int, Trace] | None:
        if self._recording is None:
            return None
        number, context, found = self._recording
        self._recording = None
        context.__exit__(None, None, None)
        return number, found

    def _before(self, model: nn.Module, inputs: tuple) -> None:
        if self._writer is None or not model.training:
            return
        number = self._forwards if self._step is None else int(self._step())
        self._forwards += 1
        # With gradient accumulation, several forwards belong to one step.
        if number % self._every or number == self._last:
            return
        self._stop()
        self._last = number
        context = trace(model)
        self._recording = (number, context, context.__enter__())

    def _after(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        recorded = self._stop()
        if recorded is not None and output is not None and recorded[1].layers:
            write_heads(self._writer, recorded[1], recorded[0], self._tag)


def _silent() -> HeadLog:
    log = HeadLog.__new__(HeadLog)
    log._writer, log._recording, log._handles = None, None, []
    return log


def write_heads(writer: Any, found: Trace, step: int, tag: str = "heads") -> None:
    """Writes a trace: the scalars, and the picture if ``writer`` accepts pictures."""
    use = found.summary()
    if use is not None:
        writer.add_scalar(f"{tag}/mean", use.mean_heads, step)
        writer.add_scalar(f"{tag}/fraction", use.mean_fraction, step)
        writer.add_scalar(f"{tag}/std_fraction", use.std_fraction, step)
        if use.mean_jaccard_distance is not None:
            writer.add_scalar(f"{tag}/jaccard_distance", use.mean_jaccard_distance, step)
    rows = []
    for name, calls in found.history.items():
        chosen = [_ops.selection_mask(s.index, s.count, torch.float32) for s in calls]  # [B, H]
        rows.append(torch.cat(chosen).mean(0).cpu())  # [H]
        own = found.summary(name)
        if own is not None:
            writer.add_scalar(f"{tag}/fraction/{name}", own.mean_fraction, step)
        budgets = [s.budget for s in calls if s.budget is not None]  # [B] each
        if budgets:
            mean = torch.cat(budgets).float().mean().item()
            writer.add_scalar(f"{tag}/budget/{name}", mean, step)
    if hasattr(writer, "add_image"):
        writer.add_image(f"{tag}/use", _picture(rows), step)


def _picture(rows: list[Tensor]) -> Tensor:
    """Layers from top to bottom, heads from left to right: [1, layers * 8, heads * 8] in [0, 1]."""
    picture = torch.zeros(len(rows), max(len(row) for row in rows))
    for place, row in enumerate(rows):
        picture[place, : len(row)] = row
    return picture.repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)[None]


def log_heads(
    writer: Any,
    model: nn.Module,
    step: Callable[[], int] | None = None,
    *,
    every: int = 50,
    tag: str = "heads",
) -> HeadLog:
    """Writes which heads run to TensorBoard, from now on, while ``model`` trains.

    ::

        hw.log_heads(SummaryWriter("runs/a"), model)

    Every ``every``-th forward in training mode is recorded as by :func:`headwise.trace` and
    written; the others cost nothing, and evaluation is not recorded. The output consists of the
    scalars ``heads/mean`` (heads that ran for an input, over all layers), ``heads/fraction`` (of
    all heads), ``heads/std_fraction`` (over inputs), ``heads/jaccard_distance`` (0: the same heads
    for all inputs), ``heads/fraction/LAYER`` and, if the gate has one, ``heads/budget/LAYER``, and
    the picture ``heads/use``: how often each head ran, one row per layer, white for always and
    black for never.

    Copies and pickles of the model do not log. For a compiled model, pass what ``torch.compile``
    returned.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its
            ``add_scalar(tag, value, step)`` and, for the picture, ``add_image(tag, image, step)``.
        model: a converted model, or one with :class:`headwise.MultiheadAttention`.
        step: returns the number of the training step; default: a count of forwards in training
            mode.
        every: writes at steps that are multiples of this.
        tag: prefix of the names.

    Returns:
        The log; ``log.remove()`` ends it.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``.
        ValueError: no layer of ``model`` has a gate, or ``every`` is not positive.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer must have add_scalar, got {type(writer).__name__}")
    if every <= 0:
        raise ValueError(f"every must be positive, got {every}")
    if all(layer.gate is None for layer in attention_layers(model).values()):
        raise ValueError(
            f"model ({type(model).__name__}) has no layer with a gate to log: "
            f"call headwise.convert(model, gate) first"
        )
    return HeadLog(writer, model, step, every, tag)
