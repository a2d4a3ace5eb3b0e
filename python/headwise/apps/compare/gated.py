"""Methods that train gates: static ones, which end as a plan, and dynamic ones.

Gates start at the budget, with the heads that matter most to the dense model. A gate that starts
with every head open spends half of the steps on closing heads, while the weights of a pruned model
adapt to their heads from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.calibration import calibrate
from headwise.apps.compare.method import Outcome, Run, kept_heads
from headwise.apps.compare.selections import predict_and_record
from headwise.apps.compare.workbench import Workbench
from headwise.gates.optimizing import choosing_parameters
from headwise.nn.layers import attention_layers

#: Static gates become a plan for the last part of training; a pipelined search ends sooner.
HARD_FROM = 0.75
PIPELINED_UNTIL = 0.4

Prototype = Callable[[float], hw.Gate]


def _start(bench: Workbench, model: nn.Module, keep: float) -> nn.Module:
    hw.start_gates(model, bench.scores()["michel"].values, keep)
    return model


def static(
    prototype: Prototype,
    score: Callable[[hw.Gate], Tensor],
    *,
    until: float = HARD_FROM,
    joint: bool = True,
) -> Run:
    """Gates that do not see the input train to the budget; then the best heads stay and train
    further.

    Args:
        prototype: share of heads -> gate.
        score: gate -> the ranking of its heads at the end of the search.
        until: share of the steps in which gates are trained.
        joint: whether the model learns meanwhile.
    """

    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        model = _start(bench, bench.gated(prototype(keep)), keep)
        batches = bench.batches()
        searching = round(until * steps)
        share = searching / steps if steps else 1.0
        trained = [p for p in model.parameters() if p.requires_grad]
        if not joint:
            gates = set(choosing_parameters(model))
            for parameter in trained:
                parameter.requires_grad_(parameter in gates)
        bench.finetune(model, batches, searching, rate_span=(0.0, share))
        for parameter in trained:
            parameter.requires_grad_(True)
        layers = attention_layers(model)
        found = {name: layer.gate for name, layer in layers.items() if layer.gate is not None}
        values = {name: score(gate).detach().double().cpu() for name, gate in found.items()}
        moves = hw.gates.head_moves(model)
        for layer in layers.values():
            layer.set_gate(None)
        plan = hw.plan(hw.HeadScores("gates", values), keep=keep)
        model = hw.prune(model, plan)
        bench.finetune(model, batches, steps - searching, rate_span=(share, 1.0))
        notes = kept_heads(plan)
        return Outcome(model, steps, notes | {"moves": moves} if moves else notes)

    return run


def dynamic(prototype: Callable[[Workbench, float], hw.Gate]) -> Run:
    """Gates that see the input train with the model, and are then calibrated to the budget."""

    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        model = _start(bench, bench.gated(prototype(bench, keep)), keep)
        bench.finetune(model, bench.batches(), steps)
        held_out = bench.validation.take(512)

        def heads_used() -> float:
            _, use = predict_and_record(
                model,
                held_out,
                bench.dense_layers,
                device=bench.device,
                precision=bench.settings.training.precision,
            )
            return use.fractions().mean().item()

        before = heads_used()
        shift = calibrate(model, heads_used, keep)
        return Outcome(model, steps, {"heads_before_calibration": before, "threshold_shift": shift})

    return run


def requested(bench: Workbench, keep: float, steps: int) -> Outcome:
    """One model is trained once for all budgets; each run requests its own."""
    trained = bench.plans.get("requested")
    if trained is None:
        gate = hw.RequestedBudgetGate(
            min_budget=0.15, noise_scale=0.0, static_until=0.0, hard_from=0.3
        )
        trained = _start(bench, bench.gated(gate), 0.5)
        bench.finetune(trained, bench.batches(), steps)
        bench.plans["requested"] = trained
    model = copy.deepcopy(trained)
    hw.request_budget(model, keep)
    return Outcome(model, steps, {"trained_for_all_budgets": True})


def threshold(bench: Workbench, keep: float, steps: int) -> Outcome:
    """Hybrid dynamic pruning: nothing is trained but one threshold, on validation inputs."""
    model = hw.convert(bench.converted(), hw.ThresholdGate())
    found = hw.calibrate_threshold(
        model,
        bench.validation.take(256).in_order(64),
        keep,
        forward_fn=bench.forward,
        tolerance=1.0,  # the resulting share is reported
    )
    return Outcome(model, 0, {"threshold": found})


#: Of the dynamic gates: at the budget and by the input from the first step.
_FROM_THE_START = {"warmup": 0.0, "static_until": 0.0, "strength": 20.0}
#: Of BudgetGate.
_BUDGET = {"noise_scale": 0.0, "temperature": 0.5, "hard_from": 0.3}


def hard_concrete_gate(keep: float) -> hw.Gate:
    """Voita et al. (2019)."""
    return hw.HardConcreteGate(keep=keep, initial_keep=keep, warmup=0.0, strength=20.0)


def subset_gate(keep: float) -> hw.Gate:
    """Li, Cotterell and Sachan (2021). Their first temperature of 1000 is for 25,000 steps from
    nothing; here the gates start from a ranking and have two hundred."""
    return hw.SubsetGate(keep=keep, temperature=1.0, cooled_at=0.6)


def sleep_gate(keep: float) -> hw.Gate:
    return hw.SleepGate(keep=keep, every=5, asleep_by=0.0)


def budget_gate(bench: Workbench, keep: float, **changes) -> hw.Gate:
    options = {
        "keep": keep,
        "min_budget": min(0.1, keep / 2),
        "initial_keep": keep,
        **_BUDGET,
        **_FROM_THE_START,
    }
    return hw.BudgetGate(**{**options, **changes})


def dynamic_hard_concrete_gate(bench: Workbench, keep: float) -> hw.Gate:
    return hw.HardConcreteGate(
        keep=keep,
        input_dependent=True,
        kept_weight="one",
        initial_keep=keep,
        hard_from=0.0,
        **_FROM_THE_START,
    )


def adavit_gate(bench: Workbench, keep: float) -> hw.Gate:
    return hw.GumbelSigmoidGate(
        keep=keep, initial_keep=keep, temperature=1.0, hard_from=0.3, **_FROM_THE_START
    )


def shared_heads_gate(bench: Workbench, keep: float) -> hw.Gate:
    """One head of every layer for every text; the others by a budget, to the same total."""
    heads = min(bench.dense_layers.values())
    routed = max((keep * heads - 1) / (heads - 1), 0.5 / heads) if heads > 1 else 1.0
    return hw.SharedHeadsGate(budget_gate(bench, min(routed, 1.0)), shared=1)


def fixed_budget_gate(bench: Workbench, keep: float) -> hw.Gate:
    """BudgetFormer's ablation: every text the same number of heads, which ones by the text."""
    return hw.BudgetGate(budget=keep, **_BUDGET, **_FROM_THE_START)


def full_budget_gate(bench: Workbench, keep: float) -> hw.Gate:
    """BudgetFormer's ablation that collapses in the paper: every text all heads."""
    return hw.BudgetGate(keep=1.0)


def unannealed_gate(bench: Workbench, keep: float) -> hw.Gate:
    """BudgetFormer's ablation: noise and temperature stay, training never runs the hard choice."""
    return budget_gate(bench, keep, noise_scale=0.5, final_temperature=0.5, hard_from=1e9)


def random_gate(bench: Workbench, keep: float) -> hw.Gate:
    """BudgetFormer's ablation: every text random heads, in training and in the test."""
    return hw.RandomGate(keep)
