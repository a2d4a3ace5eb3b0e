"""The methods that are compared: each turns the dense model into one with fewer heads.

Every method starts from the same fine-tuned dense model, sees the same batches, learns from the
same teacher and, unless it is post-hoc, trains for the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import headwise as hw
from headwise.compare import structured
from headwise.compare.calibration import calibrate
from headwise.compare.errors import UsageError
from headwise.compare.selections import predict_and_record
from headwise.compare.workbench import Workbench
from headwise.layers import attention_layers

#: Static gates become a plan, and dynamic gates choose hard, for the last part of training.
HARD_FROM = 0.75
#: Shares of importance that hies is tried with; validation texts choose.
_ALPHAS = (0.25, 0.5, 0.75, 0.9)


@dataclass
class Outcome:
    """What a method made of the dense model."""

    model: nn.Module
    train_steps: int
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method and how to speak of it.

    Attributes:
        name: as in ``--methods`` and ``results.json``.
        title: as in tables and figures.
        kind: "dense", "static" or "dynamic".
        trains: whether it trains for ``steps`` steps (post-hoc methods do not).
        run: (workbench, share of heads, steps) -> outcome.
    """

    name: str
    title: str
    kind: str
    trains: bool
    run: Callable[[Workbench, float, int], Outcome]


def _random_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    generator = torch.Generator().manual_seed(4000 + bench.seed)
    values = {
        name: torch.rand(heads, generator=generator, dtype=torch.float64)
        for name, heads in bench.dense_layers.items()
    }
    return hw.plan(hw.HeadScores("random", values), keep=keep)


def _michel_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    return hw.plan(bench.scores()["michel"], keep=keep)


def _hies_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    """The plan of HIES (arXiv 2510.13832); its alpha is the best of a few on validation texts."""
    if ("hies", keep) in bench.plans:
        return bench.plans["hies", keep]
    scores = bench.scores()
    found = hw.select_alpha(
        scores["michel"],
        scores["entropy"],
        lambda plan: bench.validation_accuracy(hw.prune(bench.converted(), plan)),
        keep,
        alphas=_ALPHAS,
    )
    bench.plans["hies", keep] = found.plan
    return found.plan


Planner = Callable[[Workbench, float], "hw.HeadPlan"]


def _post_hoc(planner: Planner) -> Callable[[Workbench, float, int], Outcome]:
    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        return Outcome(hw.prune(bench.converted(), planner(bench, keep)), 0)

    return run


def _fine_tuned(planner: Planner) -> Callable[[Workbench, float, int], Outcome]:
    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        model = hw.prune(bench.converted(), planner(bench, keep))
        bench.finetune(model, bench.batches(), steps)
        return Outcome(model, steps)

    return run


def _dense_continued(bench: Workbench, keep: float, steps: int) -> Outcome:
    """The dense model with the same further steps: what the steps alone are worth."""
    model = bench.converted()
    bench.finetune(model, bench.batches(), steps)
    return Outcome(model, steps)


def _static_hard_concrete(bench: Workbench, keep: float, steps: int) -> Outcome:
    """Gates of Voita et al. (2019) train to the budget; then the best heads stay, and train on."""
    gate = hw.HardConcreteGate(target=keep, initial_target=keep, warmup=0.0, strength=20.0)
    model = _start(bench, hw.convert(bench.converted(), gate), keep)
    batches = bench.batches()
    searching = round(HARD_FROM * steps)
    share = searching / steps if steps else 1.0
    bench.finetune(model, batches, searching, rate_span=(0.0, share))
    values = {
        name: layer.gate.log_alpha.detach().double().cpu()
        for name, layer in attention_layers(model).items()
    }
    for layer in attention_layers(model).values():
        layer.set_gate(None)
    model = hw.prune(model, hw.plan(hw.HeadScores("hard-concrete", values), keep=keep))
    bench.finetune(model, batches, steps - searching, rate_span=(share, 1.0))
    return Outcome(model, steps)


def _start(bench: Workbench, model: nn.Module, keep: float) -> nn.Module:
    """Gates begin at the budget, with the heads that matter most to the dense model.

    A gate that begins with every head open spends half of the steps on coming down, while the
    weights of a pruned model adapt to their heads from the first.
    """
    hw.start_gates(model, bench.scores()["michel"].values, keep)
    return model


def _dynamic(
    prototype: Callable[[float], hw.Gate],
) -> Callable[[Workbench, float, int], Outcome]:
    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        model = _start(bench, hw.convert(bench.converted(), prototype(keep)), keep)
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


#: Of both dynamic gates: at the budget and by the input from the first step.
_FROM_THE_START = {"warmup": 0.0, "static_until": 0.0, "strength": 20.0}


def _budget_gate(keep: float) -> hw.Gate:
    return hw.BudgetGate(
        target=keep,
        min_budget=min(0.1, keep / 2),
        initial_budget=keep,
        noise_scale=0.0,
        temperature=0.5,
        hard_from=0.3,
        **_FROM_THE_START,
    )


def _dynamic_hard_concrete_gate(keep: float) -> hw.Gate:
    return hw.HardConcreteGate(
        target=keep,
        input_dependent=True,
        kept_weight="one",
        initial_target=keep,
        hard_from=0.0,
        **_FROM_THE_START,
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense-continued", "dense, trained on", "dense", True, _dense_continued),
        Method("random-posthoc", "random", "static", False, _post_hoc(_random_plan)),
        Method("random-finetuned", "random, fine-tuned", "static", True, _fine_tuned(_random_plan)),
        Method("michel-posthoc", "michel", "static", False, _post_hoc(_michel_plan)),
        Method("michel-finetuned", "michel, fine-tuned", "static", True, _fine_tuned(_michel_plan)),
        Method("hies-posthoc", "hies", "static", False, _post_hoc(_hies_plan)),
        Method("hies-finetuned", "hies, fine-tuned", "static", True, _fine_tuned(_hies_plan)),
        Method(
            "static-hard-concrete", "static hard concrete", "static", True, _static_hard_concrete
        ),
        Method("budget-gate", "BudgetGate", "dynamic", True, _dynamic(_budget_gate)),
        Method(
            "dynamic-hard-concrete",
            "dynamic hard concrete",
            "dynamic",
            True,
            _dynamic(_dynamic_hard_concrete_gate),
        ),
        Method("kwon", "Kwon 2022", "static", False, structured.kwon),
        Method("cofi", "CoFi", "static", True, structured.cofi),
    )
}

#: What "--methods michel" stands for.
FAMILIES: dict[str, tuple[str, ...]] = {
    family: (f"{family}-posthoc", f"{family}-finetuned") for family in ("random", "michel", "hies")
}
QUICK_METHODS = ("michel-posthoc", "michel-finetuned", "static-hard-concrete", "budget-gate")
DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("dense-continued", "kwon", "cofi"))


def resolve_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of methods, families spelled out, each once.

    Raises:
        UsageError: an unknown name; the text lists the known ones.
    """
    found: list[str] = []
    for name in names:
        if name not in METHODS and name not in FAMILIES:
            known = ", ".join([*FAMILIES, *METHODS])
            raise UsageError(f"unknown method {name!r}; the methods are {known}")
        found += FAMILIES.get(name, (name,))
    return tuple(dict.fromkeys(found))
