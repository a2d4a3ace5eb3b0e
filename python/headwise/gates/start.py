"""Gates that begin where a static ranking ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from headwise.gates.base import Gate
from headwise.gates.options import fraction


def start_gates(
    model: nn.Module, importance: Mapping[str, torch.Tensor], keep: float, sharpness: float = 8.0
) -> None:
    """Starts the gates of a model from an importance ranking of its heads.

    With the gates at ``initial_budget=keep`` (or ``warmup=0``) and ``static_until=0``, training
    spends none of its steps on coming down from all heads. Relevance starts at ``sharpness *
    (rank - (1 - keep))`` with ``rank`` in [0, 1] over the heads of all layers; a layer's budget at
    the share of its heads among the ``keep`` most important. Ours.

    Args:
        model: has gates that are trained.
        importance: for every such gate, by the name of its attention layer, a score a head ``[H]``.
        keep: share of the heads of the model to start with, in (0, 1].
        sharpness: range of the relevance over the ranking.

    Raises:
        ValueError: ``keep`` outside (0, 1], a gate without a score, the wrong number of heads, or
            a score that is not finite.
    """
    fraction("keep", keep)
    found: dict[str, Gate] = {}
    for name, module in model.named_modules():
        outer = next(reversed(found), None)
        if outer is not None and name.startswith(f"{outer}."):
            continue  # started by the gate that it is in
        if isinstance(module, Gate) and module.num_heads is not None:
            if hasattr(module, "start_from"):
                found[name] = module
    found = {name.removesuffix("gate").removesuffix("."): gate for name, gate in found.items()}
    scores = []
    for name, gate in found.items():
        if name not in importance:
            raise ValueError(f"importance must have a score for layer {name!r}")
        score = torch.as_tensor(importance[name], dtype=torch.float64)  # [H]
        if score.shape != (gate.num_heads,):
            raise ValueError(
                f"importance of layer {name!r} must have {gate.num_heads} heads, "
                f"got {list(score.shape)}"
            )
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"importance of layer {name!r} must be finite, got NaN or infinity")
        scores.append(score)
    if not scores:
        return
    start = torch.ops.headwise.importance_start(torch.cat(scores), keep, sharpness)
    parts = start.split([len(score) for score in scores])
    for gate, part in zip(found.values(), parts, strict=True):
        if len(part):
            gate.start_from(part, float((part > 0).double().mean()))
