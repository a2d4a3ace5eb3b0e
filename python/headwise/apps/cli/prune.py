"""``headwise prune``: makes a model smaller, by a plan or by scores on texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headwise.apps.cli.common import (
    add_common,
    add_model,
    loaded,
    say,
    share,
    writable_file,
)
from headwise.apps.cli.score import ONE_PASS
from headwise.apps.cli.texts import LabelledTexts, add_texts, journal, labelled_texts, one_source
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.registry import example_of

#: The metric that ranks heads by how often a model's gates run them.
USE = "use"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "prune",
        help="remove heads, or more, from a model",
        description="Removes the heads that a plan drops from the weights of a model, or with "
        "--keep and --data those that matter least on labelled texts or images, and writes the "
        "smaller model to --out (read it with headwise.load). --method kwon also removes neurons "
        "of the feed-forward networks, and tunes the remaining weights.",
    )
    add_model(parser, "a classifier of texts, images or sounds")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="from 'headwise score --keep', or a structure plan",
    )
    parser.add_argument(
        "--keep",
        type=share,
        metavar="SHARE",
        help="instead of --plan: the share of heads to keep (kwon: of multiply-accumulates)",
    )
    method = parser.add_argument(
        "--method",
        choices=("ranking", "kwon"),
        default="ranking",
        help="how --keep chooses what to remove: a ranking of the heads (default), or Kwon et al. "
        "2022: heads and neurons, without training",
    )
    parser.add_argument(
        "--latency",
        type=share,
        metavar="SHARE",
        help="kwon, instead of --keep: the share of the layers' time, measured on this machine",
    )
    parser.add_argument(
        "--gates",
        action="store_true",
        help="instead of --plan: the heads that the model's gates choose, if these are the same "
        "for every input",
    )
    metric = parser.add_argument(
        "--metric",
        choices=(*ONE_PASS, USE),
        default="michel",
        help="what --keep ranks by (michel); use: how often the model's gates run a head over the "
        "texts, for a model whose gates choose for every input; the gates are removed",
    )
    exact = parser.add_argument(
        "--exact", action="store_true", help="score the remaining heads again after every step"
    )
    step = parser.add_argument(
        "--step",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of all heads that a step of --exact removes (default: 0.1)",
    )
    texts, kept = add_texts(parser)
    add_common(parser, out=None)
    parser.set_defaults(
        of_search=[method, metric, exact, step, *texts, kept],
        of_ranking=[metric, exact, step, kept],
        of_steps=[exact, step, kept],
        step_option=step,
    )
    return parser


def run(options: argparse.Namespace) -> None:
    import headwise as hw
    from headwise.apps.tasks.models import CLASSIFIERS, load_tokenizer
    from headwise.io.files import write_json

    _check(options)
    plan = _load_plan(options.plan) if options.plan is not None else None
    found = options.data is not None or options.task is not None
    model, device = loaded(options, example_of(options.task, options.data) if found else None)
    of_texts = type(model).__name__.endswith(CLASSIFIERS["text"])
    _check_gates(options, model, plan)
    try:
        report: dict[str, Any] = {}
        small = None
        if options.method == "kwon":
            texts = labelled_texts(options, model, device)
            plan, small, report = hw.pruning.kwon_prune(
                model, texts.batches, texts.loss, macs=options.keep, latency=options.latency
            )
        elif options.gates:
            plan = hw.plan_from_gates(model)
        elif plan is None:
            texts = labelled_texts(options, model, device)
            plan = _found(options, model, texts)
        small = hw.prune(model, plan) if small is None else small
        tokenizer = load_tokenizer(options.model) if of_texts else None
        hw.save(small, options.out, tokenizer=tokenizer)
        if options.plan is None:
            plan.save(options.out / "plan.json")
    except ValueError as error:
        raise UsageError(str(error)) from None

    def heads(model) -> int:
        return sum(layer.num_heads for layer in hw.attention_layers(model).values())

    def parameters(model) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    result: dict[str, Any] = {
        "model": str(options.model),
        "out": str(options.out),
        "heads": [heads(model), heads(small)],
        "parameters": [parameters(model), parameters(small)],
        "heads_by_layer": {
            name: layer.num_heads for name, layer in hw.attention_layers(small).items()
        },
        "neurons_by_layer": hw.pruning.structure(small).neurons,
        "report": report,
    }
    say(
        f"heads {result['heads'][0]} -> {result['heads'][1]}, "
        f"parameters {result['parameters'][0]:,} -> {result['parameters'][1]:,}; "
        f"wrote {options.out}"
    )
    if options.json is not None:
        write_json(options.json, result)


def _found(options: argparse.Namespace, model, texts: LabelledTexts):
    """The plan for --keep and --metric."""
    import headwise as hw

    if options.metric == USE:
        return hw.pruning.plan_from_use(model, texts.batches, texts.logits, options.keep)
    return hw.pruning.pruning_path(
        model,
        texts.batches,
        texts.loss,
        options.keep,
        step=options.step if options.exact else 1.0,
        exact=options.exact,
        metric=options.metric,
        journal=journal(options, "pruning"),
    )[-1]


def _check_gates(options: argparse.Namespace, model, plan) -> None:
    """Raises an error for a method that does not fit the model's gates, and names one that does."""
    import headwise as hw

    gates = [layer.gate for layer in hw.attention_layers(model).values() if layer.gate is not None]
    choosing = any(gate.static_weight() is None for gate in gates)
    from_use = options.metric == USE or getattr(plan, "metric", None) == USE
    if choosing and not (from_use and options.method == "ranking" and not options.gates):
        raise UsageError(
            f"the model in {options.model} has gates that choose for every input, so no plan does "
            "what it does: --keep SHARE --data FILE --metric use keeps the heads that they run "
            "most often"
        )
    if from_use and not choosing:
        raise UsageError(
            f"--metric use needs a model with gates that choose for every input; {options.model} "
            "has none"
        )
    if gates and not choosing and options.keep is not None:
        raise UsageError(
            f"the model in {options.model} has gates that choose the same heads for every input: "
            "make it smaller by them first (headwise prune --gates)"
        )


def _check(options: argparse.Namespace) -> None:
    if options.out is None:
        raise UsageError("prune needs --out DIR for the smaller model")
    if options.out.resolve() == options.model.resolve():
        raise UsageError("--out must not be the folder of the model that is pruned")
    if options.latency is not None and options.method != "kwon":
        raise UsageError("--latency needs --method kwon")
    if options.latency is not None and options.keep is not None:
        raise UsageError("--method kwon needs --keep SHARE or --latency SHARE, one of the two")
    found = options.keep is not None or options.latency is not None
    if (options.plan is not None) + found + options.gates != 1:
        raise UsageError("prune needs one of --plan FILE, --keep SHARE and --gates")
    if found and options.data is None and options.task is None:
        raise UsageError("--keep scores heads on labelled inputs, so it needs --data or --task")
    if found:
        one_source(options)
    if not found:
        asked = "--plan" if options.plan is not None else "--gates"
        for name in _given(options, options.of_search):
            raise UsageError(f"{name} is a way of finding heads, so it needs --keep, not {asked}")
    if options.method != "ranking":
        for name in _given(options, options.of_ranking):
            raise UsageError(f"{name} belongs to --method ranking")
    if options.metric == USE:
        for name in _given(options, options.of_steps):
            raise UsageError(
                f"{name} is of a search that scores heads in steps, so it cannot be used with "
                "--metric use"
            )
    if not options.exact and _given(options, [options.step_option]):
        raise UsageError("--step needs --exact")
    if options.plan is not None and not options.plan.is_file():
        raise UsageError(f"there is no plan {options.plan}")
    writable_file(options.json)
    writable_file(options.out.parent / "out" if not options.out.exists() else None)


def _given(options: argparse.Namespace, actions: list[argparse.Action]) -> list[str]:
    """Which of these options have another value than their default."""
    return [
        action.option_strings[0]
        for action in actions
        if getattr(options, action.dest) != action.default
    ]


def _load_plan(path: Path):
    """A plan of heads, or of more."""
    import headwise as hw

    try:
        plan = hw.pruning.StructurePlan.load(path)
    except ValueError as error:
        raise UsageError(f"{path} is not a plan: {error}") from None
    alone = not plan.ffn and not plan.blocks and plan.hidden is None
    return plan.heads if alone else plan
