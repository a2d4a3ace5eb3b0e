"""Heads that can replace each other, by joint ablation: either can be removed, but not both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.analysis.interaction import head_interactions, head_similarity
from headwise.explain.use import linked_groups, number
from headwise.nn.batches import batch_list
from headwise.nn.layers import attention_layers

_ops = torch.ops.headwise

#: False discovery rate at which a pair counts as able to replace each other.
LEVEL = 0.05


def joint_ablation(
    model: nn.Module,
    batches: Sequence[Any],
    forward_fn: Callable[[nn.Module, Any], Tensor],
    *,
    pairs: int,
    journal: Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any] | None:
    """Which heads of a layer can replace each other for the model's own predictions.

    The ``pairs`` pairs of one layer with the most similar outputs
    (:func:`headwise.analysis.head_similarity`) are ablated separately and together
    (:func:`headwise.analysis.head_interactions`); the loss is the negative log-probability of the
    class that the whole model predicts. A pair counts if removing both costs more than the sum of
    removing each: one-sided normal test of the mean over inputs, corrected for the number of pairs.

    Args:
        model: a converted model in evaluation mode.
        batches: what ``forward_fn`` takes.
        forward_fn: ``(model, batch) -> class scores [B, C]``.
        pairs: how many to test.
        journal: keeps finished ablations.
        seed: of the tokens on which outputs are compared.
        progress: progress bars on stderr; None: after two seconds, on a terminal.

    Returns:
        A part of the document ``headwise.use``; None if no layer has two heads.
    """
    layers = attention_layers(model)
    if not any(layer.num_heads > 1 for layer in layers.values()):
        return None
    batches = batch_list(batches)
    predicted = {id(batch): forward_fn(model, batch).argmax(1) for batch in batches}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:  # [B]
        scores = forward_fn(model, batch)
        return F.cross_entropy(scores, predicted[id(batch)].to(scores.device), reduction="none")

    alike = head_similarity(model, batches, forward_fn, seed=seed, progress=progress)
    row = {head: place for place, head in enumerate(alike.heads)}
    inside = [
        (float(alike.matrix[row[one], row[other]]), one, other)
        for place, one in enumerate(alike.heads)
        for other in alike.heads[place + 1 :]
        if one[0] == other[0]
    ]
    inside.sort(key=lambda entry: -entry[0])
    chosen = inside[:pairs]
    found = head_interactions(
        model,
        batches,
        loss_fn,
        [(one, other) for _, one, other in chosen],
        journal=journal,
        progress=progress,
    )
    z = found.effect / found.standard_error.clamp(min=1e-300)  # [P]
    rates = _ops.false_discovery_rate(torch.special.ndtr(-z))
    place_of = {name: place for place, name in enumerate(layers)}
    rows: list[dict[str, Any]] = []
    linked = []
    for (likeness, one, other), effect, error, rate in zip(
        chosen,
        found.effect.tolist(),
        found.standard_error.tolist(),
        rates.tolist(),
        strict=True,
    ):
        first, second = ((place_of[name], head) for name, head in (one, other))
        rows.append(
            {
                "first": list(first),
                "second": list(second),
                "similarity": number(likeness),
                "effect": number(effect),
                "standard_error": number(error),
                "alone": [number(found.single[one]), number(found.single[other])],
                "q": number(rate),
            }
        )
        if effect > 0 and rate < LEVEL:
            linked.append((first, second))
    rows.sort(key=lambda entry: -(entry["effect"] or 0.0))
    return {
        "inputs": sum(len(classes) for classes in predicted.values()),
        "layers": list(layers),
        "pairs": rows,
        "groups": linked_groups(linked),
    }
