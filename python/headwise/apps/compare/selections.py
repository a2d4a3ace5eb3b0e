"""Which heads a model runs for each input of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.statistics import mean_jaccard_distance
from headwise.apps.compare.training import predict
from headwise.apps.tasks.examples import Batch, Examples
from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers


@dataclass(frozen=True)
class HeadUse:
    """Which heads ran.

    Attributes:
        chosen: bool [N, heads]: for every input, every head of the model, layer by layer. The width
            is that of the *dense* model: heads that were pruned away are never chosen.
        layers: number of heads of each layer of the dense model.
    """

    chosen: Tensor
    layers: tuple[int, ...]

    def fractions(self) -> Tensor:
        """[N]: the share of the model's heads that ran for each input."""
        return self.chosen.double().mean(1)

    def summary(self) -> dict:
        """The numbers about it in ``results.json``."""
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


def predict_and_record(
    model: nn.Module, examples: Examples, dense_layers: dict[str, int], **options
) -> tuple[Tensor, HeadUse]:
    """What :func:`headwise.apps.compare.training.predict` reads of a converted model, and the heads
    that each input ran.

    Args:
        dense_layers: name and number of heads of each attention layer before any pruning.
        options: those of :func:`headwise.apps.compare.training.predict`.
    """
    with instrument(model, evaluate=False) as opened:
        present = {name: layer.num_heads for name, layer in opened.layers.items()}
        chosen = torch.zeros(len(examples), sum(present.values()), dtype=torch.bool)
        seen: dict[str, Tensor] = {}  # of the current batch: [B, H]

        def observe(name: str, layer, selection: hw.Selection, x, padding) -> None:
            seen[name] = torch.ops.headwise.selection_mask(
                selection.index, selection.count, torch.float32
            )

        def collect(batch: Batch) -> None:
            every = torch.ones(len(batch.rows), max(present.values(), default=0))
            parts = [  # without a gate, every head runs
                seen[name].cpu() if name in seen else every[:, :heads]
                for name, heads in present.items()
            ]
            seen.clear()
            chosen[batch.rows] = torch.cat(parts, 1) > 0

        opened.observe(observe)
        found = predict(model, examples, after_batch=collect, **options)
    if present != dense_layers:  # pruned: removed heads were never chosen
        parts, start = [], 0
        for name, heads in dense_layers.items():
            kept = present.get(name, 0)
            part = torch.zeros(len(examples), heads, dtype=torch.bool)
            part[:, :kept] = chosen[:, start : start + kept]
            start += kept
            parts.append(part)
        chosen = torch.cat(parts, 1)
    return found, HeadUse(chosen, tuple(dense_layers.values()))


@contextlib.contextmanager
def swapped(model: nn.Module) -> Iterator[None]:
    """Every input runs the heads that its gates chose for another input of the batch, half a batch
    away: the same number of heads, but others. If accuracy stays, the choice does not matter."""

    def shift(gate: nn.Module, args: tuple, selection: hw.Selection) -> hw.Selection:
        rows = len(selection.count)
        other = torch.arange(rows, device=selection.count.device).roll(rows // 2)
        return selection.moved(lambda tensor: tensor.index_select(0, other))

    gates = [layer.gate for layer in attention_layers(model).values() if layer.gate is not None]
    handles = [gate.register_forward_hook(shift) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_dynamic(model: nn.Module) -> bool:
    """Whether a gate chooses heads for each input."""
    return any(isinstance(module, hw.Gate) for module in model.modules())
