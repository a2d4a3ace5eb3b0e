"""Up to how many heads dynamic selection is faster than the dense model, measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

import headwise as hw
from headwise.apps.bench.contenders import random_gate, randomise
from headwise.apps.compare.measure import inputs_of, interleaved_seconds
from headwise.apps.compare.workbench import Workbench
from headwise.nn.layers import attention_layers

#: Shares of the heads at which latency is measured.
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def dynamic_model(model: nn.Module, share: float) -> nn.Module:
    """``model`` (of :func:`headwise.convert`) with gates: every text runs the given share of the
    heads of each layer; which ones, it chooses.

    The gates' relevance is random: what is measured is the cost of texts that differ.
    """
    model = hw.convert(model, random_gate(share))
    generator = torch.Generator().manual_seed(11)
    for layer in attention_layers(model).values():
        randomise(layer.gate, generator)
    return model.eval()


def static_model(model: nn.Module, share: float) -> nn.Module:
    """The same number of heads of each layer, the same heads for every text, the rest removed."""
    values = {
        name: torch.arange(layer.num_heads, 0, -1, dtype=torch.float64)
        for name, layer in attention_layers(model).items()
    }
    plan = hw.plan(hw.HeadScores("first", values), keep=share, scope="layer")
    return hw.prune(model, plan).eval()


def crossing(shares: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The largest share up to which every ratio stays at or below 1, by linear interpolation.

    Returns:
        1.0 where every ratio does; None where the first already does not.
    """
    if ratios[0] > 1:
        return None
    for left in range(len(shares) - 1):
        if ratios[left + 1] > 1:
            span = ratios[left + 1] - ratios[left]
            part = (1 - ratios[left]) / span
            return shares[left] + part * (shares[left + 1] - shares[left])
    return shares[-1]


def break_even(bench: Workbench) -> dict:
    """Latency against heads of dynamic and of pruned models, for each shape of the settings.

    The dense model is measured in the same rounds. ``price`` is what dynamic costs over the pruned
    model with as many heads: the median over shares of their ratio.
    """
    models = []
    for share in SHARES:
        models += [
            dynamic_model(bench.converted(), share),
            static_model(bench.converted(), share),
        ]
    # Rounding to whole heads a layer: what runs is what is reported.
    layers = list(bench.dense_layers.values())
    real = [sum(max(1, int(s * h + 0.5)) for h in layers) / sum(layers) for s in SHARES]
    found = []
    for shape in bench.settings.shapes:
        inputs = inputs_of(bench.test, shape, bench.device, count=4)
        seconds = interleaved_seconds(
            [bench.dense, *models],
            inputs,
            bench.device,
            budget_s=4 * bench.settings.latency_s,
            least=4,
        )
        dense, rest = seconds[0], seconds[1:]
        ratios = [statistics.median(b / a for a, b in zip(dense, own, strict=True)) for own in rest]
        dynamic, static = ratios[0::2], ratios[1::2]
        found.append(
            {
                "batch": shape.batch,
                "length": shape.length,
                "heads": real,
                "dynamic_ratio": dynamic,
                "static_ratio": static,
                "dense_ms": statistics.median(dense) * 1e3,
                "break_even_heads": crossing(real, dynamic),
                "price": statistics.median(d / s for d, s in zip(dynamic, static, strict=True)) - 1,
            }
        )
    return {"task": bench.task, "shapes": found}
