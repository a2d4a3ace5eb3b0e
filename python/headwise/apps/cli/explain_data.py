"""``headwise explain --data``: the roles and uses of a model's heads over a data set."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.apps.cli.common import (
    add_labels_are,
    loaded,
    own_folder,
    positive,
    say,
    writable_outputs,
)
from headwise.apps.pages import options as page_options
from headwise.apps.pages.words import TELL_UNKNOWN
from headwise.apps.tasks.errors import UsageError
from headwise.io.printable import quoted


def threshold(text: str) -> tuple[str, float]:
    """``NAME=VALUE``"""
    name, equals, value = text.partition("=")
    try:
        return name.replace("-", "_"), float(value) if equals else float("nan")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {quoted(text)}") from None


def add_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of ``--data``."""
    group = parser.add_argument_group("data set")
    syntax = group.add_mutually_exclusive_group()
    return [
        group.add_argument("--text-column", default="text", metavar="COLUMN", help="default: text"),
        group.add_argument(
            "--label-column", metavar="COLUMN", help="default: label, if there is one"
        ),
        add_labels_are(group),
        group.add_argument(
            "--limit", type=positive, default=2000, metavar="N", help="texts (default: 2000)"
        ),
        syntax.add_argument(
            "--conllu", type=Path, metavar="FILE", help="parsed sentences, for syntactic roles"
        ),
        syntax.add_argument(
            "--spacy",
            metavar="PIPELINE",
            help="parse the texts, for syntactic roles (if installed)",
        ),
        syntax.add_argument(
            "--alignments",
            type=Path,
            metavar="FILE",
            help="aligned pairs of texts, 'words ||| words ||| 0-0 1-1' a line, for alignment "
            "roles",
        ),
        group.add_argument(
            "--grid",
            nargs=2,
            type=positive,
            metavar=("ROWS", "COLUMNS"),
            help="the texts are images, one token per patch in order: ask about 2-D offsets",
        ),
        group.add_argument(
            "--joint-ablation",
            type=positive,
            default=0,
            metavar="PAIRS",
            help="test this many pairs of heads for replacing each other (0.1 to 1 s each)",
        ),
        group.add_argument(
            "--others",
            nargs="+",
            type=Path,
            default=[],
            metavar="DIR",
            help="models of other seeds or tasks, to compare selections with",
        ),
        group.add_argument(
            "--threshold",
            nargs="+",
            type=threshold,
            default=[],
            metavar="NAME=VALUE",
            help="when a head has a role (see headwise.explain.RoleThresholds)",
        ),
    ]


def run(options: argparse.Namespace) -> None:
    writable_outputs(options)
    with own_folder(options.out):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    import torch

    import headwise as hw
    from headwise.apps.tasks.models import load_tokenizer, load_trained
    from headwise.apps.tasks.tasks import class_numbers
    from headwise.explain import parse_with_spacy, read_alignments, read_conllu
    from headwise.io.files import write_json

    folder = None if options.out is None else options.out / "parts"
    thresholds = _thresholds(options.threshold)
    texts, labels = _texts(options)
    model, device = loaded(options)
    names = [path.name for path in options.others]
    if len(set(names)) < len(names):  # runs/1/model and runs/2/model
        names = [str(path) for path in options.others]
    others = {
        name: load_trained(path).to(device)
        for name, path in zip(names, options.others, strict=True)
    }
    tokenizer = load_tokenizer(options.model)
    numbers = None
    if labels is not None:
        numbers = class_numbers(labels, model.config.label2id, options.labels_are)
    torch.manual_seed(options.seed)
    try:
        sentences = alignments = None
        if options.alignments is not None:
            alignments = read_alignments(options.alignments, limit=options.limit)
        elif options.conllu is not None:
            sentences = read_conllu(options.conllu, limit=options.limit)
        elif options.spacy is not None:
            sentences = parse_with_spacy(texts, options.spacy)
        result = hw.explain_data(
            model,
            texts,
            tokenizer,
            labels=None
            if labels is None or numbers is None
            else [numbers[label] for label in labels],
            sentences=sentences,
            alignments=alignments,
            grid=None if options.grid is None else tuple(options.grid),
            joint_ablation=options.joint_ablation,
            others=others,
            thresholds=thresholds,
            batch_size=options.batch_size,
            max_length=options.max_length,
            seed=options.seed,
            folder=folder,
        )
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {error.filename}") from None
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0]) from None
    except KeyboardInterrupt:
        if folder is not None:
            import sys

            say(
                f"headwise explain: interrupted; finished parts are kept in {options.out}, and "
                "the same command resumes from there",
                file=sys.stderr,
            )
        raise
    say(render(result))
    if options.out is not None:
        write_json(options.out / "use.json", result)
        say(f"\nwrote {options.out / 'use.json'}")
    if options.json is not None:
        write_json(options.json, result)
        say(f"\nwrote {options.json}")
    page_options.write(options, result)


def _thresholds(given: list[tuple[str, float]]):
    from headwise.explain import RoleThresholds

    thresholds = RoleThresholds()
    for name, value in given:
        if not hasattr(thresholds, name) or name == "of":
            names = ", ".join(vars(thresholds))
            raise UsageError(f"--threshold must name one of {names}, got {quoted(name)}")
        try:
            if name == "least_trials":
                if not value.is_integer():
                    raise ValueError(f"least_trials must be a whole number, got {value:g}")
                value = int(value)
            changed: dict[str, Any] = {name: value}
            thresholds = replace(thresholds, **changed)
        except ValueError as error:
            raise UsageError(f"--threshold: {error}") from None
    return thresholds


def _texts(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Texts, and their labels if the file has them; a sample of --limit by --seed."""
    from headwise.apps.tasks.tasks import read_label, read_rows, read_text

    path = options.data
    label_column = options.label_column or "label"
    rows = read_rows(path, [options.text_column, *([label_column] if options.label_column else [])])
    has_labels = label_column in rows[0].cells
    if len(rows) > options.limit:
        rows = random.Random(options.seed).sample(rows, options.limit)
    texts, labels = [], []
    for row in rows:
        text = read_text(row, options.text_column, path)
        if text.strip():
            texts.append(text)
            if has_labels:
                labels.append(read_label(row, label_column, path))
    if len(texts) < 2:
        raise UsageError(f"{path} must have at least two texts, got {len(texts)}")
    return texts, labels if has_labels else None


def render(result: dict[str, Any]) -> str:
    """The content of the document as text."""
    use, data = result["use"], result["data"]
    lines = [
        f"{data['texts']} texts"
        + ("" if data["accuracy"] is None else f", accuracy {data['accuracy']:.1%}")
        + f"; {use['heads_mean']:.1f} of {use['heads']} heads run on average "
        f"({use['heads_min']} to {use['heads_max']})",
        *(
            [f"{data['tokens_unknown']:.0%} of the tokens are unknown to the tokenizer"]
            if (data["tokens_unknown"] or 0.0) >= TELL_UNKNOWN
            else []
        ),
        "",
        "roles (share of the scoring half, its 95% interval, baseline)",
    ]
    found = 0
    for layer in result["roles"]["layers"]:
        for head in layer["heads"]:
            for role in head["roles"]:
                found += 1
                name = role["role"] + (f" {role['detail']}" if role["detail"] else "")
                against = "" if role["baseline"] is None else f"  {role['baseline']:.2f}"
                lines.append(
                    f"  layer {layer['site']:2} head {head['head']:2}  {name:40}"
                    f" {role['share']:.2f} ({role['low']:.2f}-{role['high']:.2f}){against}"
                )
    if not found:
        lines.append("  no head has one")
    told = [row for row in result["role_use"] if row["q"] is not None and row["q"] < 0.05]
    lines += ["", f"roles and use: {len(told)} of {len(result['role_use'])} differences at 5% FDR"]
    for row in told:
        lines.append(
            f"  {row['role']}: {row['property']} {row['mean']:.3f}, other heads "
            f"{row['mean_of_others']:.3f} (q {row['q']:.3f})"
        )
    lines += ["", "stability: Jaccard overlap of selections, with that of other texts beside it"]
    for row in result["stability"]:
        accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.1%}"
        lines.append(
            f"  {row['name']:16} {row['jaccard']:.2f} ({row['low']:.2f}-{row['high']:.2f}), "
            f"{row['jaccard_other_inputs']:.2f}; same prediction {row['same_prediction']:.1%}"
            f"{accuracy}"
        )
    faith = result["faithfulness"]
    if faith is None:
        lines += ["", "faithfulness: the gates give no relevance to order heads by"]
    else:
        lines += [
            "",
            f"faithfulness: removing heads as ordered keeps {faith['area']:+.3f} "
            f"({faith['low']:+.3f} to {faith['high']:+.3f}) of log-probability more than at random",
        ]
    joint = result["joint_ablation"]
    if joint is not None:
        lines += [
            "",
            f"joint ablation: {len(joint['pairs'])} pairs of heads, {len(joint['groups'])} groups "
            "whose heads can replace each other at 5% FDR",
        ]
        for group in joint["groups"]:
            lines.append(f"  layer {group['site']} heads {', '.join(map(str, group['heads']))}")
    return "\n".join(lines)
