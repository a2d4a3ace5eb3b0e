"""Methods that rank the heads of the dense model and keep the best: one plan for every input."""

from __future__ import annotations

from collections.abc import Callable

import torch

import headwise as hw
from headwise.apps.compare.method import Outcome, Run, kept_heads
from headwise.apps.compare.workbench import Workbench

#: Shares of importance to try for hies, from entropy alone to importance alone; validation inputs
#: choose.
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
#: Share of the heads that a step of michel-exact removes (Michel et al. 2019, section 4).
_STEP = 0.1


def random_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    generator = torch.Generator().manual_seed(4000 + bench.seed)
    values = {
        name: torch.rand(heads, generator=generator, dtype=torch.float64)
        for name, heads in bench.dense_layers.items()
    }
    return hw.plan(hw.HeadScores("random", values), keep=keep)


def michel_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    return hw.plan(bench.scores()["michel"], keep=keep)


def michel_exact_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    """A tenth of the heads at a time; the remaining ones are scored again after each."""
    if ("michel-exact", keep) not in bench.plans:
        path = hw.pruning.pruning_path(
            bench.converted().eval(),
            bench.scoring_batches(),
            bench.losses,
            keep,
            step=_STEP,
            exact=True,
            progress=False,
        )
        bench.plans["michel-exact", keep] = path[-1]
    return bench.plans["michel-exact", keep]


def hies_plan(bench: Workbench, keep: float) -> hw.HeadPlan:
    """The plan of HIES (arXiv 2510.13832); its alpha is the best of a few on validation inputs."""
    if ("hies", keep) in bench.plans:
        return bench.plans["hies", keep]
    scores = bench.scores("per_example")  # importance as in the paper
    found = hw.pruning.select_alpha(
        bench.converted(),
        bench.validation.in_order(32),
        bench.errors,
        scores["michel"],
        scores["entropy"],
        keep,
        alphas=ALPHAS,
    )
    bench.plans["hies", keep] = found.plan
    return found.plan


Planner = Callable[[Workbench, float], "hw.HeadPlan"]


def post_hoc(planner: Planner) -> Run:
    def run(bench: Workbench, keep: float, steps: int) -> Outcome:
        plan = planner(bench, keep)
        return Outcome(hw.prune(bench.converted(), plan), 0, kept_heads(plan))

    return run


def dense_continued(bench: Workbench, keep: float, steps: int) -> Outcome:
    """The dense model with the same further steps, to measure the effect of the steps alone."""
    model = bench.converted()
    bench.finetune(model, bench.batches(), steps)
    return Outcome(model, steps)
