"""Which heads a model runs for each text of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.statistics import mean_jaccard_distance
from headwise.apps.compare.training import predict
from headwise.apps.tasks.examples import Batch, Examples
from headwise.nn.layers import attention_layers


@dataclass(frozen=True)
class HeadUse:
    """Which heads ran.

    Attributes:
        chosen: bool [N, heads]: for every text, every head of the model, layer by layer. The width
            is that of the *dense* model: heads that were pruned away are never chosen.
        layers: number of heads of each layer of the dense model.
    """

    chosen: Tensor
    layers: tuple[int, ...]

    def fractions(self) -> Tensor:
        """[N]: the share of the model's heads that ran for each text."""
        return self.chosen.double().mean(1)

    def summary(self) -> dict:
        """The numbers that ``results.json`` holds about it."""
        fractions = self.fractions()
        often = self.chosen.double().mean(0)  # [heads]
        return {
            "heads_mean": fractions.mean().item(),
            "heads_std": fractions.std(correction=0).item(),
            "heads_min": fractions.min().item(),
            "heads_max": fractions.max().item(),
            "jaccard_distance": mean_jaccard_distance(self.chosen),
            "heads_by_layer": [
                part.mean().item() for part in often.split(list(self.layers)) if part.numel()
            ],
            "heads_always": int((often > 0.98).sum()),
            "heads_never": int((often < 0.02).sum()),
        }


class _Recorder:
    """Collects the selections of every layer while a model runs."""

    def __init__(self, model: nn.Module, rows: int):
        self.layers = attention_layers(model)
        self.total = sum(layer.num_heads for layer in self.layers.values())
        self.chosen = torch.zeros(rows, self.total, dtype=torch.bool)
        self._parts: dict[int, Tensor] = {}

    def __enter__(self) -> _Recorder:
        for position, layer in enumerate(self.layers.values()):
            layer._observers.append(self._observer(position))
        return self

    def __exit__(self, *unused) -> None:
        for layer in self.layers.values():
            layer._observers.pop()

    def _observer(self, position: int) -> Callable:
        def observe(layer, selection, x, key_padding_mask) -> None:
            self._parts[position] = torch.ops.headwise.selection_mask(
                selection.index, selection.count, torch.float32
            )  # [B, H]

        return observe

    def collect(self, batch: Batch) -> None:
        """Called after a batch has run."""
        parts = []
        for position, layer in enumerate(self.layers.values()):
            part = self._parts.pop(position, None)
            if part is None:  # no gate: every head runs
                part = torch.ones(len(batch.rows), layer.num_heads)
            parts.append(part.cpu() > 0)
        self.chosen[batch.rows] = torch.cat(parts, 1)


def predict_and_record(
    model: nn.Module, examples: Examples, dense_layers: dict[str, int], **options
) -> tuple[Tensor, HeadUse]:
    """Logits [N, C] of a converted model, and the heads that each text ran.

    Args:
        dense_layers: name and number of heads of each attention layer before any pruning.
        options: those of :func:`headwise.apps.compare.training.predict`.
    """
    with _Recorder(model, len(examples)) as recorder:
        logits = predict(model, examples, after_batch=recorder.collect, **options)
    chosen = recorder.chosen
    present = {name: layer.num_heads for name, layer in recorder.layers.items()}
    if present != dense_layers:  # pruned: the heads that are gone were never chosen
        parts, start = [], 0
        for name, heads in dense_layers.items():
            kept = present.get(name, 0)
            part = torch.zeros(len(examples), heads, dtype=torch.bool)
            part[:, :kept] = chosen[:, start : start + kept]
            start += kept
            parts.append(part)
        chosen = torch.cat(parts, 1)
    return logits, HeadUse(chosen, tuple(dense_layers.values()))


def is_dynamic(model: nn.Module) -> bool:
    """Whether a gate chooses heads for each input."""
    return any(isinstance(module, hw.Gate) for module in model.modules())
