"""The time of an attention layer by its heads, and of a feed-forward network by its neurons."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise._C import LatencyFit
from headwise.io.files import read_text, write_json
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import progress_bar
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.pruning.structured.description import Structure, structure

__all__ = ["LatencyTable", "measure_latency"]

LatencyFit.__module__ = __name__
_FORMAT, _VERSION = "headwise.latency", 1


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of one layer's blocks, by their number of units.

    Attributes:
        batch_size: sequences of a call.
        length: tokens of a sequence.
        heads: units that were measured.
        head_seconds: an attention layer's median time with each of them.
        neurons: the same of a feed-forward network.
        neuron_seconds: the same of a feed-forward network.
        threads: threads that PyTorch used.
        device: the device of the measurement.
        embed_dim: width of the measured layers; None: not known.
        head_dim: width of their heads; None: not known.
    """

    batch_size: int
    length: int
    heads: tuple[int, ...]
    head_seconds: tuple[float, ...]
    neurons: tuple[int, ...]
    neuron_seconds: tuple[float, ...]
    threads: int
    device: str
    embed_dim: int | None = None
    head_dim: int | None = None

    @property
    def head_fit(self) -> LatencyFit:
        """The fit for the search: constant, then linear."""
        return _C.fit_latency(list(self.heads), list(self.head_seconds))

    @property
    def neuron_fit(self) -> LatencyFit:
        return _C.fit_latency(list(self.neurons), list(self.neuron_seconds))

    def check(self, found: Structure) -> None:
        """Raises an error for a model whose blocks differ from the measured ones.

        Raises:
            ValueError: it has more units in a layer, or layers of another width.
        """
        units = (("heads", self.heads, found.heads), ("neurons", self.neurons, found.neurons))
        for what, measured, there in units:
            most = max(there.values(), default=0)
            if most > max(measured):
                raise ValueError(
                    f"latency_table must cover the model's layers, got times of up to "
                    f"{max(measured)} {what} for layers of {most}: measure it on this model"
                )
        for name, layer in found.attention.items():
            for width in ("embed_dim", "head_dim"):
                measured, there = getattr(self, width), getattr(layer, width)
                if measured is not None and measured != there:
                    raise ValueError(
                        f"latency_table must be of the model's layers, got one of {width}="
                        f"{measured}, and {layer_called(name)} has {there}: measure it on this "
                        "model"
                    )

    def to_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> LatencyTable:
        """Raises ValueError: naming the key that is unknown, missing or wrong."""
        what = "latency table"
        if not isinstance(document, Mapping):
            raise ValueError(f"{what} must be a JSON object, got {quoted(document)}")
        if document.get("format") != _FORMAT or document.get("version") != _VERSION:
            raise ValueError(f"{what} must have format '{_FORMAT}' and version {_VERSION}")
        values = {key: value for key, value in document.items() if key not in ("format", "version")}
        expected = set(LatencyTable.__dataclass_fields__)
        optional = {"embed_dim", "head_dim"}  # files of version 0.1 may lack them
        for key in sorted(set(values) ^ expected - (optional - set(values))):
            verb = "lacks the" if key in expected else "has an unknown"
            raise ValueError(f"{what} {verb} key '{key}'")
        for units, seconds in (("heads", "head_seconds"), ("neurons", "neuron_seconds")):
            for key in (units, seconds):
                if not isinstance(values[key], (list, tuple)):
                    raise ValueError(f"'{key}' of {what} must be a list, got {quoted(values[key])}")
                values[key] = tuple(values[key])
            _C.fit_latency(list(values[units]), list(values[seconds]))  # raises if wrong
        return LatencyTable(**values)

    def save(self, path: str | Path) -> None:
        """Writes JSON atomically."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Of a file that :meth:`save` wrote.

        Raises:
            TypeError, OSError: ``path`` is not a file that can be read.
            ValueError: the file holds something else.
        """
        text = read_text(path)
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"latency table is not valid JSON: {error}") from None
        return LatencyTable.from_dict(document)


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 32,
    length: int = 128,
    budget_s: float = 6.0,
    progress: bool | None = None,
) -> LatencyTable:
    """Times the blocks of ``model`` on this machine, with fewer and fewer units.

    New blocks are built, with the sizes of the model's first layer and random weights, on the
    model's device. They alternate, so that all see the same noise; medians are kept.

    Args:
        model: a converted model with feed-forward networks that
            :func:`headwise.pruning.structure` finds.
        batch_size: sequences of a call.
        length: tokens of a sequence.
        budget_s: approximate seconds to spend.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no feed-forward network, layers of different sizes, or a size that is not
            positive.
    """
    if batch_size <= 0 or length <= 0 or budget_s <= 0:
        raise ValueError(
            f"batch_size, length and budget_s must be positive, got {batch_size}, {length} and "
            f"{budget_s}"
        )
    found = structure(model)
    if not found.ffn:
        raise ValueError(f"model ({type(model).__name__}) has no feed-forward network to measure")
    layer: Any = next(iter(found.attention.values()))
    ffn = next(iter(found.ffn.values()))
    like = {"device": layer.out_proj.weight.device, "dtype": layer.out_proj.weight.dtype}
    x = torch.randn(batch_size, length, layer.embed_dim, **like)
    heads = _steps(max(found.heads.values()), 12)
    neurons = _steps(max(found.neurons.values()), 12)
    calls = [_attention_call(layer, count, x, like) for count in heads]
    calls += [_ffn_call(ffn, count, x, like) for count in neurons]
    with progress_bar(None, "measuring latency", "call", progress) as bar:
        seconds = _medians(calls, x.device, budget_s, bar.update)
    return LatencyTable(
        batch_size,
        length,
        tuple(heads),
        tuple(seconds[: len(heads)]),
        tuple(neurons),
        tuple(seconds[len(heads) :]),
        torch.get_num_threads(),
        str(x.device),
        layer.embed_dim,
        layer.head_dim,
    )


def _steps(most: int, count: int) -> list[int]:
    """At most ``count`` numbers of units, evenly spread, from a few to all of them."""
    if most < 2:
        raise ValueError(f"layers must have at least 2 units to be measured, got {most}")
    return sorted({max(1, round(most * (i + 1) / count)) for i in range(count)})


def _attention_call(layer: MultiheadAttention, heads: int, x: Tensor, like: dict) -> Callable:
    own = MultiheadAttention(
        layer.embed_dim, heads, batch_first=True, head_dim=layer.head_dim, **like
    ).eval()
    return lambda: own(x, x, x, need_weights=False)


def _ffn_call(ffn, neurons: int, x: Tensor, like: dict) -> Callable:
    first = nn.Linear(ffn.first.in_features, neurons, **like)
    second = nn.Linear(neurons, ffn.first.in_features, **like)
    return lambda: second(nn.functional.gelu(first(x)))


def _medians(
    calls: Sequence[Callable], device: torch.device, budget_s: float, called: Callable[[], Any]
) -> list[float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(seconds[0]) < 3 or (time.perf_counter() - start < budget_s and len(seconds[0]) < 100):
        for call, own in zip(calls, seconds, strict=True):
            began = now()
            call()
            own.append(now() - began)
            called()
    return [statistics.median(own) for own in seconds]
