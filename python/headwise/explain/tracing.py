"""What the gates of a model selected and why, recorded while a trace is active."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headwise import _C
from headwise.gates.selection import Selection
from headwise.io.display import Grid, Shown
from headwise.io.files import write_atomic
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.instrumenting import instrument

__all__ = ["Trace", "trace"]

TraceSummary = _C.TraceSummary


class Trace(Shown):
    """The selections of a model's gated layers, call by call; made by :func:`trace`."""

    def __init__(self) -> None:
        self._core = _C.Trace()

    @property
    def layers(self) -> list[str]:
        """Names of the layers that were recorded, in the order of their first call."""
        return self._core.layers

    @property
    def selections(self) -> dict[str, Selection]:
        """Each layer's selection in its last call: index ``[B, H]``, count ``[B]``, weight
        ``[B, H]``, relevance ``[B, H]`` or None, budget ``[B]`` or None; detached."""
        return {name: Selection(*self._core.history(name)[-1]) for name in self.layers}

    @property
    def history(self) -> dict[str, list[Selection]]:
        """Each layer's selections in all its calls, oldest first."""
        return {
            name: [Selection(*call) for call in self._core.history(name)] for name in self.layers
        }

    def summary(self, layer: str | None = None) -> TraceSummary | None:
        """How the heads of ``layer``, or of the whole model, were distributed over the inputs.

        Returns:
            ``sequences`` (inputs seen), ``mean_heads``, ``mean_fraction`` (of all heads),
            ``std_fraction`` (standard deviation over inputs of the fraction: 0 if every input got
            the same budget) and ``mean_jaccard_distance`` (mean over pairs of inputs of 1 - |A and
            B| / |A or B| for the sets A, B of heads that ran: 0 if every input ran the same heads;
            None with fewer than two inputs). For the whole model an input's set is that of all
            layers together; None if nothing was recorded, or if layers saw different numbers of
            inputs.

        Raises:
            IndexError: nothing was recorded for ``layer``.
        """
        return self._core.summary() if layer is None else self._core.summary(layer)

    def _use(self) -> dict[str, tuple[list[float], list[float | None]]]:
        """Layer name -> each head's share of inputs that ran it, and its mean weight for those."""
        found = {}
        for name, calls in self.history.items():
            ran = torch.cat([
                torch.ops.headwise.selection_mask(call.index, call.count, torch.float64)
                for call in calls
            ])  # [N, H]  # fmt: skip
            weight = torch.cat([call.weight.double() for call in calls])  # [N, H]
            often = ran.sum(0)  # [H]
            mean = ((weight * ran).sum(0) / often).tolist()  # NaN: never ran
            found[name] = (ran.mean(0).tolist(), [None if w != w else w for w in mean])
        return found

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"layer": name, "head": head, "share": share, "mean_weight": weight}
            for name, use in self._use().items()
            for head, (share, weight) in enumerate(zip(*use, strict=True))
        ]

    def _grid(self) -> Grid:
        shares = {name: share for name, (share, _) in self._use().items()}
        return Grid.of_heads("share of the inputs that ran each head", shares)

    def to_json(self, indent: int | None = None) -> str:
        """The trace as JSON text, format ``headwise.trace`` (docs/interpretability.md)."""
        return self._core.to_json(-1 if indent is None else indent)

    def to_dict(self) -> dict[str, Any]:
        """The content of :meth:`to_json` as Python objects."""
        return json.loads(self.to_json())

    def save(self, path: str | os.PathLike) -> None:
        """Writes :meth:`to_json` to ``path`` atomically.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(path, self.to_json(indent=1) + "\n")

    def clear(self) -> None:
        """Deletes the records."""
        self._core.clear()

    def __repr__(self) -> str:
        return f"Trace({len(self.layers)} layers, {self.summary()})"


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Records the selections of every gated layer of ``model`` inside a ``with`` block.

    ::

        with hw.trace(model) as t:
            model(**batch)
        t.selections["encoder.layer.0.attention.self.mha"].index

    Nothing is recorded outside the block, and tracing costs nothing when no trace is active. Traces
    may be nested; each records everything. Recording keeps small copies on the device without
    waiting for it; reading a summary or JSON brings them to the host.

    Raises:
        ValueError: ``model`` has no :class:`headwise.MultiheadAttention`.
    """
    with instrument(model, evaluate=False) as opened:
        if not opened.layers:
            raise ValueError(
                f"model ({type(model).__name__}) has no headwise.MultiheadAttention to trace: "
                f"call headwise.convert first"
            )
        result = Trace()

        # Recording is plain C++ and cannot be compiled.
        @torch._dynamo.disable
        def record(name: str, layer: AttentionLayer, selection: Selection, x, padding) -> None:
            result._core.record(name, layer.num_heads, *selection)

        opened.observe(record)
        yield result
