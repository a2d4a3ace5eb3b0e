"""A method of the comparison, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

import headwise as hw
from headwise.apps.compare.workbench import Workbench


@dataclass
class Outcome:
    """The model that a method made from the dense model."""

    model: nn.Module
    train_steps: int
    notes: dict = field(default_factory=dict)


def kept_heads(plan: hw.HeadPlan) -> dict:
    """The note about a plan in a run's record: layer -> its heads that stay."""
    return {"kept": {layer.name: list(layer.heads) for layer in plan.layers}}


Run = Callable[[Workbench, float, int], Outcome]


def then_trained(run: Run) -> Run:
    """The same, and then all training steps: which heads run for which text is fixed before."""

    def trained(bench: Workbench, keep: float, steps: int) -> Outcome:
        outcome = run(bench, keep, steps)
        bench.finetune(outcome.model, bench.batches(), steps)
        return replace(outcome, train_steps=steps)

    return trained


@dataclass(frozen=True)
class Method:
    """A method and its names.

    Attributes:
        name: as in ``--methods`` and ``results.json``.
        title: as in tables and figures.
        kind: "dense", "static" or "dynamic".
        trains: whether it trains for ``steps`` steps (post-hoc methods do not).
        run: (workbench, share of heads, steps) -> outcome.
        texts_only: whether it knows the layers of text encoders alone.
        encoders_only: why it cannot be applied to an encoder-decoder; None: it can.
    """

    name: str
    title: str
    kind: str
    trains: bool
    run: Run
    texts_only: bool = False
    encoders_only: str | None = None
