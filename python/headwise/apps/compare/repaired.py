"""Methods without training: the remaining heads compensate for the pruned ones, with one plan or a
bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.method import Outcome, Run, kept_heads
from headwise.apps.compare.planned import Planner
from headwise.apps.compare.training import graded, logits_of
from headwise.apps.compare.workbench import Workbench
from headwise.apps.tasks.examples import IGNORED, Examples
from headwise.gates.optimizing import choosing_parameters

#: The layer whose input the router reads: the embeddings, which are frozen, so that inputs
#: follow the same plans before and after training.
_AT = 0

#: Plans of a bank, if the task has no domains.
PLANS = 4

Mapping = dict[str, Tensor]
#: In a mapping, beside the model's arguments.
LABELS = "labels"


def mappings(examples: Examples, device: torch.device, batch_size: int = 32) -> list[Mapping]:
    """Batches as ``hw.repair`` and ``hw.pruning.fit_bank`` take them, with the labels."""
    return [
        {**moved.inputs, LABELS: moved.labels}
        for moved in (batch.to(device) for batch in examples.in_order(batch_size))
    ]


def forward(model: nn.Module, batch: Mapping) -> Tensor:
    """Logits [B, C] in float32: least squares are solved for what the model computes exactly.

    Of tokens [B, T, C], with zeros for padding: it depends on no head.
    """
    inputs = {name: value for name, value in batch.items() if name != LABELS}
    logits = logits_of(model, inputs)
    if logits.dim() == 2:
        return logits
    return logits.masked_fill((batch[LABELS] == IGNORED)[..., None], 0.0)


def divergence(model: nn.Module, batches: list[Mapping]) -> hw.HeadScores:
    return hw.pruning.divergence_scores(model, batches, forward_fn=forward, progress=False)


def calibration(bench: Workbench) -> Examples:
    """The training inputs that heads are scored on."""
    return bench.train.take(bench.settings.score_limit)


def domains_in_order(examples: Examples, batch_size: int = 32) -> Tensor | None:
    """The domain of each input, in the order of :func:`mappings`; None if there is only one."""
    if examples.domain_of is None:
        return None
    return torch.cat([examples.domain_of[b.rows] for b in examples.in_order(batch_size)])


def removal_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    """Heads are removed in the order in which the others, repaired, compensate for them best."""
    if "repair" not in bench.plans:
        batches = mappings(calibration(bench), bench.device)
        bench.plans["repair"] = hw.pruning.repair_scores(
            bench.converted(), batches, forward_fn=forward, progress=False
        )
    return hw.plan(bench.plans["repair"], keep=keep)


def repaired(planner: Planner) -> Run:
    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        batches = mappings(calibration(bench), bench.device)
        plan = planner(bench, keep)
        small = hw.prune(bench.converted(), plan, repair=batches, forward_fn=forward)
        return Outcome(small, 0, kept_heads(plan))

    return run


def divergence_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    """The heads that the dense model's predictions depend on most; no labels."""
    if "divergence" not in bench.plans:
        batches = mappings(calibration(bench), bench.device)
        bench.plans["divergence"] = divergence(bench.converted(), batches)
    return hw.plan(bench.plans["divergence"], keep=keep)


def fitted(bench: Workbench, keep: float, steps: int) -> Outcome:
    """Gates fitted to the frozen dense model on the inputs that plans are made from; they do not
    train afterwards."""
    gate = hw.HardConcreteGate(
        keep=keep,
        initial_keep=keep,
        warmup=0.0,
        input_dependent=True,
        kept_weight="one",
        static_until=0.0,
        hard_from=0.0,
    )
    model = bench.gated(gate)
    batches = mappings(calibration(bench), bench.device)
    fit = hw.pruning.fit_gates(model, batches, keep, forward_fn=forward, progress=False)
    for parameter in choosing_parameters(model):
        parameter.requires_grad_(False)
    return Outcome(model, 0, {"ridge": fit.ridge, "explained": fit.explained})


def bank(bench: Workbench, keep: float, steps: int) -> Outcome:
    """A repaired plan for each domain, or for each of some clusters; a router picks by the
    input."""
    examples = calibration(bench)
    found = hw.pruning.fit_bank(
        bench.converted(),
        mappings(examples, bench.device),
        divergence,
        keep,
        at=_AT,
        forward_fn=forward,
        seed=bench.seed,
        **_grouping(domains_in_order(examples)),
    )
    return Outcome(found.model, 0, {"plans": len(found.plans), "routed_to_own": found.routed})


def _grouping(domains: Tensor | None) -> dict:
    """Domains are separated by a linear classifier, for which the maximum over tokens shows single
    words; clusters by the nearest centroid."""
    if domains is None:
        return {"plans": PLANS, "router": "centroid"}
    return {"clusters": domains, "router": "softmax", "features": ("mean", "max")}


def measure_headroom(bench: Workbench) -> dict:
    """``hw.headroom`` of the task: what choosing by the input could win, before any training.

    If it cannot be measured (a layer that runs many times has no second plan), it gives the reason.
    """
    try:
        found = _headroom(bench)
    except ValueError as error:
        sentence = f"Headroom was not measured: {error}"
        return {"task": bench.task, "sentences": [sentence], "dense": None, "rows": []}
    return {"task": bench.task, "sentences": found.sentences(), **found.to_dict()}


def _headroom(bench: Workbench) -> hw.pruning.Headroom:
    calibrating = calibration(bench)
    held_out = bench.validation.take(1000)

    def right(model: nn.Module, batch: Mapping) -> Tensor:
        return graded(forward(model, batch), batch[LABELS])[:, 0].double()

    return hw.headroom(
        bench.converted(),
        mappings(calibrating, bench.device),
        mappings(held_out, bench.device),
        divergence,
        right,
        keep=[share for share in bench.settings.keep if share < 1.0] or [0.5],
        held_out_clusters=domains_in_order(held_out),
        forward_fn=forward,
        seed=bench.seed,
        progress=False,
        at=_AT,
        **_grouping(domains_in_order(calibrating)),
    )
