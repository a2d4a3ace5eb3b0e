"""The methods that are compared: each turns the dense model into one with fewer heads.

Every method starts from the same fine-tuned dense model, sees the same batches, learns from the
same teacher and, unless it is post-hoc, trains for the same number of steps.
"""

from __future__ import annotations

import difflib

from headwise.apps.compare import gated, planned, repaired, structured
from headwise.apps.compare.method import Method, Outcome, Run, then_trained
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import OwnModel, Translator
from headwise.io.printable import quoted

__all__ = ["METHODS", "Method", "Outcome", "resolve_methods"]


def _twice(
    name: str, trained: str, title: str, how: str, kind: str, run: Run
) -> tuple[Method, Method]:
    """A method without training, and followed by all training steps."""
    return (
        Method(name, title, kind, False, run),
        Method(trained, f"{title}, {how}", kind, True, then_trained(run)),
    )


def _planned(family: str, planner: planned.Planner) -> tuple[Method, Method]:
    run = planned.post_hoc(planner)
    return _twice(f"{family}-posthoc", f"{family}-finetuned", family, "fine-tuned", "static", run)


def _repaired(name: str, title: str, kind: str, run: Run) -> tuple[Method, Method]:
    return _twice(name, f"{name}-trained", title, "trained", kind, run)


def _dynamic(name: str, title: str, prototype, kind: str = "dynamic") -> Method:
    return Method(name, title, kind, True, gated.dynamic(prototype))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense-continued", "dense, trained on", "dense", True, planned.dense_continued),
        *_planned("random", planned.random_plan),
        *_planned("michel", planned.michel_plan),
        *_planned("michel-exact", planned.michel_exact_plan),
        *_planned("hies", planned.hies_plan),
        *_repaired(
            "michel-repaired", "michel, repaired", "static", repaired.repaired(planned.michel_plan)
        ),
        *_repaired(
            "removal-repaired",
            "greedy removal, repaired",
            "static",
            repaired.repaired(repaired.removal_plan),
        ),
        *_repaired(
            "divergence-repaired",
            "divergence, repaired",
            "static",
            repaired.repaired(repaired.divergence_plan),
        ),
        *_repaired("bank", "bank of repaired plans", "dynamic", repaired.bank),
        *_repaired("fitted-gates", "fitted gates", "dynamic", repaired.fitted),
        Method(
            "static-hard-concrete",
            "static hard concrete",
            "static",
            True,
            gated.static(gated.hard_concrete_gate, lambda gate: gate.log_alpha),
        ),
        Method(
            "subset",
            "SubsetGate, joint",
            "static",
            True,
            gated.static(gated.subset_gate, lambda gate: gate.scores),
        ),
        Method(
            "subset-pipelined",
            "SubsetGate, pipelined",
            "static",
            True,
            gated.static(
                gated.subset_gate,
                lambda gate: gate.scores,
                until=gated.PIPELINED_UNTIL,
                joint=False,
            ),
        ),
        Method(
            "sleeping",
            "heads asleep and awake",
            "static",
            True,
            # The score decides which heads stay.
            gated.static(gated.sleep_gate, lambda gate: gate.score + 1e9 * gate.awake),
        ),
        _dynamic("budget-gate", "BudgetGate", gated.budget_gate),
        _dynamic(
            "dynamic-hard-concrete", "dynamic hard concrete", gated.dynamic_hard_concrete_gate
        ),
        Method("requested-budget", "one model, any budget", "dynamic", True, gated.requested),
        _dynamic("adavit", "AdaViT gate", gated.adavit_gate),
        _dynamic("shared-heads", "BudgetGate, one head shared", gated.shared_heads_gate),
        Method(
            "threshold",
            "HDP threshold",
            "dynamic",
            False,
            gated.threshold,
            encoders_only="reads queries and keys of every head, which a cache does not have",
        ),
        _dynamic("budget-fixed", "BudgetGate, fixed budget", gated.fixed_budget_gate),
        _dynamic("budget-unannealed", "BudgetGate, no annealing", gated.unannealed_gate),
        _dynamic("budget-random", "random heads per text", gated.random_gate),
        _dynamic("budget-full", "BudgetGate, full budget", gated.full_budget_gate, kind="dense"),
        Method(
            "kwon",
            "Kwon 2022",
            "static",
            False,
            structured.kwon,
            encoders_only="counts the operations of one sequence",
        ),
        Method("cofi", "CoFi", "static", True, structured.cofi, texts_only=True),
    )
}

_REPAIRED = (
    "michel-repaired",
    "removal-repaired",
    "divergence-repaired",
    "bank",
    "fitted-gates",
)
#: The methods of "--methods NAME", if NAME is not a method.
FAMILIES: dict[str, tuple[str, ...]] = {
    **{
        family: (f"{family}-posthoc", f"{family}-finetuned")
        for family in ("random", "michel", "michel-exact", "hies")
    },
    "repaired": _REPAIRED,
    "repaired-trained": tuple(f"{name}-trained" for name in _REPAIRED),
    "ablations": (
        "budget-gate",
        "budget-fixed",
        "budget-unannealed",
        "budget-random",
        "budget-full",
    ),
    "all": tuple(METHODS),
}
QUICK_METHODS = ("michel-posthoc", "michel-finetuned", "static-hard-concrete", "budget-gate")
DEFAULT_METHODS = (
    *FAMILIES["random"],
    *FAMILIES["michel"],
    *FAMILIES["hies"],
    "static-hard-concrete",
    "budget-gate",
    "dynamic-hard-concrete",
)
FULL_METHODS = ("dense-continued", *DEFAULT_METHODS)


def _suits(method: Method, model: OwnModel | None) -> bool:
    """Whether the method can be applied to a task's own model; None: a text encoder."""
    if model is None:
        return True
    return not method.texts_only and not (method.encoders_only and isinstance(model, Translator))


def resolve_methods(names: tuple[str, ...], model: OwnModel | None = None) -> tuple[str, ...]:
    """Names of methods, families spelled out, each once.

    Args:
        model: a task's own: families are without the methods that it cannot have.

    Raises:
        UsageError: an unknown name (the text has those like it), or a method that the model
            cannot have.
    """
    found: list[str] = []
    for name in names:
        if name not in METHODS and name not in FAMILIES:
            near = difflib.get_close_matches(name, [*FAMILIES, *METHODS])
            meant = f", did you mean {' or '.join(near)}?" if near else ":"
            raise UsageError(
                f"unknown method {quoted(name)}{meant} --list-methods prints what there is"
            )
        if name in METHODS and METHODS[name].texts_only and model is not None:
            raise UsageError(f"the method {name} is for text encoders, not for a {model.name}")
        if name in METHODS and METHODS[name].encoders_only and isinstance(model, Translator):
            raise UsageError(
                f"the method {name} is not for a {model.name}: it {METHODS[name].encoders_only}"
            )
        found += [own for own in FAMILIES.get(name, (name,)) if _suits(METHODS[own], model)]
    return tuple(dict.fromkeys(found))
