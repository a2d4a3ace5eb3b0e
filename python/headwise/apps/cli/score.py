"""``headwise score``: how much each head of a trained model matters, and plans made of it."""

from __future__ import annotations

import argparse
from typing import Any

from headwise.apps.cli.common import (
    add_common,
    add_model,
    loaded,
    say,
    share,
    writable_outputs,
)
from headwise.apps.cli.texts import LabelledTexts, add_texts, journal, labelled_texts, one_source
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.registry import example_of

#: From one pass over the texts.
ONE_PASS = ("michel", "entropy", "attention_confidence", "hies")
#: From separate searches.
SEARCHES = ("ablation", "all-but-one", "lrp", "causal")
#: --keep makes no plan of these: they describe what heads do, not how much that matters.
DESCRIPTIVE = ("entropy", "attention_confidence")


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "score",
        help="score the heads of a trained model on labelled inputs",
        description="Scores every attention head of a trained classifier on labelled texts, images "
        "or sounds, prints a table, and with --keep writes a plan for 'headwise prune'.",
    )
    add_model(parser)
    add_texts(parser)
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=ONE_PASS + SEARCHES,
        default=["michel", "entropy", "hies"],
        help="default: michel entropy hies; ablation, all-but-one and causal take a pass over the "
        "texts for every head or step",
    )
    parser.add_argument(
        "--keep", type=share, metavar="SHARE", help="also write a plan that keeps this share"
    )
    add_common(parser, out=None)
    return parser


def run(options: argparse.Namespace) -> None:
    import headwise as hw
    from headwise.io.files import write_json

    if options.keep is not None and options.out is None:
        raise UsageError("--keep writes plans, so it needs --out DIR")
    one_source(options)
    writable_outputs(options)
    model, device = loaded(options, example_of(options.task, options.data))
    texts = labelled_texts(options, model, device)
    try:
        scores, details = _score(options, model, texts)
    except ValueError as error:
        raise UsageError(str(error)) from None
    result: dict[str, Any] = {
        "model": str(options.model),
        "data": texts.name,
        f"{texts.example}s": texts.count,
        "scores": {
            metric: {name: values.tolist() for name, values in found.values.items()}
            for metric, found in scores.items()
        },
    }
    if details:
        result["details"] = details
    for metric, found in result["scores"].items():
        say(f"{metric}\n{table(found)}\n")
    if "lrp" in details:
        say(f"lrp: conservation error {details['lrp']['conservation_error']:.1e}\n")
    if options.json is not None:
        write_json(options.json, result)
    if options.out is not None:
        write_json(options.out / "scores.json", result)
        say(f"wrote {options.out / 'scores.json'}")
        for metric in options.metrics if options.keep is not None else ():
            if metric not in DESCRIPTIVE:
                path = options.out / f"plan-{metric}.json"
                hw.plan(scores[metric], keep=options.keep).save(path)
                say(f"wrote {path}")


def _score(options: argparse.Namespace, model, texts: LabelledTexts) -> tuple[dict, dict]:
    """metric -> scores, in the requested order, and details of each."""
    import headwise as hw

    wanted = list(dict.fromkeys(options.metrics))
    one_pass = [metric for metric in wanted if metric in ONE_PASS]
    scores = hw.score_heads(model, texts.batches, texts.loss, metrics=one_pass) if one_pass else {}
    details: dict[str, dict] = {}
    for metric in wanted:
        if metric in ("ablation", "all-but-one"):
            search = hw.analysis.ablate_heads if metric == "ablation" else hw.analysis.keep_one_head
            kept = journal(options, metric)
            found: Any = search(model, texts.batches, texts.loss, seed=options.seed, journal=kept)
            details[metric] = {
                "loss": found.losses.mean().item(),
                "p_value": {name: p.tolist() for name, p in found.p_value.items()},
            }
        elif metric == "lrp":
            found = hw.analysis.lrp_scores(model, texts.batches, texts.logits)
            details[metric] = {
                "conservation_error": found.conservation_error,
                "bias_share": found.bias_share,
            }
        elif metric == "causal":
            kept = journal(options, metric)
            found = hw.analysis.causal_heads(model, texts.batches, texts.loss, journal=kept)
            details[metric] = {"roles": found.roles()}
        else:
            continue
        scores[metric] = found.scores
    return {metric: scores[metric] for metric in wanted}, details


def table(scores: dict[str, list[float]]) -> str:
    """One row per layer, one column per head."""
    width = max(len(name) for name in scores)
    heads = max(len(values) for values in scores.values())
    lines = [" " * width + "".join(f"{head:>8}" for head in range(heads))]
    for name, values in scores.items():
        lines.append(name.ljust(width) + "".join(f"{value:8.4f}" for value in values))
    return "\n".join(lines)
