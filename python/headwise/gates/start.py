"""Starting gates from a static ranking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from headwise.gates.base import Gate
from headwise.io.checked import check_number
from headwise.io.printable import layer_called, quoted


@runtime_checkable
class Scores(Protocol):
    """A :class:`headwise.HeadScores`, which is defined above this package."""

    metric: str  # a tensor has sign and values too, but no metric

    @property
    def sign(self) -> float: ...

    @property
    def values(self) -> Mapping[str, torch.Tensor]: ...


def start_gates(
    model: nn.Module,
    importance: Scores | Mapping[str, torch.Tensor],
    keep: float,
    sharpness: float = 8.0,
) -> None:
    """Starts the gates of a model from an importance ranking of its heads.

    With the gates at ``initial_keep=keep`` (or ``warmup=0``) and ``static_until=0``, training
    spends no steps on annealing down from all heads. Relevance starts at ``sharpness * (rank - (1 -
    keep))`` with ``rank`` in [0, 1] over the heads of all layers; a layer's budget at the share of
    its heads among the ``keep`` most important. Ours.

    Args:
        model: has gates that are trained.
        importance: scores of its heads (:class:`headwise.HeadScores`; of the metric ``"entropy"``
            the smallest are the most important, as for :func:`headwise.plan`); or a mapping: for
            every such gate, by the name of its attention layer, one score per head ``[H]``, the
            largest for the most important.
        keep: share of the heads of the model to start with, in (0, 1].
        sharpness: range of the relevance over the ranking.

    Raises:
        TypeError: ``importance`` is neither, or ``keep`` or ``sharpness`` is not a number.
        ValueError: ``keep`` outside (0, 1], a gate without a score, the wrong number of heads, or
            a score that is not finite.
    """
    check_number("keep", keep)
    check_number("sharpness", sharpness)
    scores = _by_layer(importance)
    found: dict[str, Gate] = {}
    for name, module in model.named_modules():
        outer = next(reversed(found), None)
        if outer is not None and name.startswith(f"{outer}."):
            continue  # started by the gate that it is in
        if isinstance(module, Gate) and module.num_heads is not None:
            if hasattr(module, "start_from"):
                found[name] = module
    found = {name.removesuffix("gate").removesuffix("."): gate for name, gate in found.items()}
    for name in found:
        if name not in scores:
            raise ValueError(f"importance must have a score for {layer_called(name)}")
    starts = torch.ops.headwise.gate_starts(
        [scores[name] for name in found],
        list(found),
        [gate.num_heads for gate in found.values()],
        keep,
        sharpness,
    )
    for gate, relevance, share in zip(found.values(), *starts, strict=True):
        if len(relevance):
            gate.start_from(relevance, share)


def _by_layer(importance: Scores | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Layer name -> float64 ``[H]``, the largest for the most important head."""
    if isinstance(importance, Scores):
        return {name: importance.sign * values for name, values in importance.values.items()}
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance must be a headwise.HeadScores, got {quoted(importance)}")
    for name, values in importance.items():
        if isinstance(values, Scores):
            raise TypeError(
                f"importance must be one headwise.HeadScores, got a mapping of them: take one of "
                f"its metrics, importance[{quoted(name)}]"
            )
    return {
        name: torch.as_tensor(values, dtype=torch.float64) for name, values in importance.items()
    }
