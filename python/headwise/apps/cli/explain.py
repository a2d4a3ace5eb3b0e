"""``headwise explain``: why these heads, for texts given by hand or for a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headwise.apps.cli import explain_data
from headwise.apps.cli.common import (
    add_common,
    add_model,
    loaded,
    number,
    positive,
    say,
    writable_outputs,
)
from headwise.apps.cli.texts import add_task, tensor_examples, tensor_task
from headwise.apps.pages import options as page_options
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.registry import example_of
from headwise.io.printable import printable, quoted

DESCRIPTION = """\
With --text, or --row for images and sounds: which heads of a trained classifier run, and why:
relevance and its share by token or patch, margins, what each head looks at, and the measured effect
of toggling it.
With --data: what each head does over a data set and for which texts it runs, how stable that is,
and whether the gates' ranking matches the heads' effect. With --out, finished parts of an
interrupted run are saved there, and the same command resumes from them.
Prints a summary; --json FILE and --out DIR (explanation.json, use.json) write everything
(docs/interpretability.md has the schemas); --format html adds a page for people.
"""


def maps(text: str) -> tuple[int, int] | str:
    """``all``, ``none`` or ``SITE:HEAD``."""
    if text in ("all", "none"):
        return text
    site, colon, head = text.partition(":")
    if not (colon and site.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected all, none or LAYER:HEAD, got {quoted(text)}")
    return int(site), int(head)


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "explain",
        help="explain which heads run for a text, and why",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="explain these texts; one that begins with a dash is given as --text=-TEXT",
    )
    what.add_argument(
        "--data", type=Path, metavar="FILE", help="a data set: .csv or .jsonl; images: .npz"
    )
    add_task(what)
    one = parser.add_argument_group("texts, and images or sounds one by one")
    of_text = [
        one.add_argument(
            "--row",
            nargs="+",
            type=row,
            metavar="N",
            help="explain these images or sounds of --data FILE.npz or --task, counted from 0",
        ),
        one.add_argument(
            "--roles", type=Path, metavar="FILE", help="JSON from --data: tell heads' roles"
        ),
        one.add_argument(
            "--maps",
            nargs="+",
            type=maps,
            metavar="LAYER:HEAD",
            help="attention maps to keep: all, none (default without --format) or some heads",
        ),
        one.add_argument(
            "--pairs", type=positive, default=5, metavar="N", help="strongest token pairs per head"
        ),
        one.add_argument(
            "--steps", type=positive, default=32, metavar="N", help="nodes of integrated gradients"
        ),
        one.add_argument(
            "--no-effects",
            action="store_true",
            help="do not measure the effect of toggling heads",
        ),
    ]
    parser.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="texts per forward, or heads toggled per forward",
    )
    of_data = explain_data.add_options(parser)
    page_options.add_options(parser)
    add_common(parser, out=None)
    parser.set_defaults(of_text=of_text, of_data=of_data)
    return parser


def row(text: str) -> int:
    """The number of an input, from 0."""
    return number(text, int, lambda value: value >= 0, "0 or more")


def run(options: argparse.Namespace) -> None:
    if options.task is not None or example_of(None, options.data) != "text":
        _explain_rows(options)
        return
    if options.row is not None:
        raise UsageError(
            "--row is of images and sounds (--data FILE.npz, --task); give texts by --text"
        )
    kind, others = ("text", options.of_data) if options.data is None else ("data", options.of_text)
    for action in others:
        if getattr(options, action.dest) != action.default:
            asked = "data" if kind == "text" else "text"
            raise UsageError(f"{action.option_strings[0]} is for --{asked}, not for --{kind}")
    page_options.check(options)
    if options.data is not None:
        explain_data.run(options)
    else:
        explain_texts(options)


def explain_texts(options: argparse.Namespace) -> None:
    from headwise.apps.tasks.models import load_tokenizer

    _check_maps(options)
    for place, text in enumerate(options.text):
        if not text.strip():
            raise UsageError("--text must not be empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                "--text must be text that UTF-8 can hold, got half a surrogate pair at character "
                f"{error.start} of text {place}"
            ) from None
    writable_outputs(options)
    roles = _roles(options)
    model, _ = loaded(options)
    tokenizer = load_tokenizer(options.model)
    named = {"tokenizer": tokenizer, "max_length": options.max_length}
    _told(options, _explained(options, model, options.text, roles, **named), roles)


def _explain_rows(options: argparse.Namespace) -> None:
    """Explains images or sounds, whose tokens are patches."""
    example = example_of(options.task, options.data)
    for action in options.of_data:
        if getattr(options, action.dest) != action.default:
            raise UsageError(f"{action.option_strings[0]} is of texts, not of {example}s")
    if options.row is None:
        raise UsageError(
            f"{example}s are explained one by one, so it needs --row N: what heads do over a data "
            "set is asked in questions about words"
        )
    page_options.check(options)
    _check_maps(options)
    writable_outputs(options)
    roles = _roles(options)
    model, device = loaded(options, example)
    options.labels_are = None
    task = tensor_task(options, model)
    for place in options.row:
        if place >= len(task):
            raise UsageError(f"--row must be below {len(task)}, got {place}")
    batch = tensor_examples(task, options.row, model).batch(range(len(options.row))).to(device)
    pictures = [patches(task.example, values, model.config) for values in task.inputs[options.row]]
    mark = "rc" if example == "image" else "bt"
    names = [
        [f"[{n}]" for n in range(own["first"])]
        + [f"{mark[0]}{r}{mark[1]}{c}" for r in range(own["rows"]) for c in range(own["columns"])]
        for own in pictures
    ]
    names = [["[CLS]", *own[1:]] for own in names]
    labels = list(task.classes) if len(task.classes) == model.config.num_labels else None
    result = _explained(options, model, batch.inputs, roles, tokens=names, labels=labels)
    classes = {value: name for name, value in model.config.label2id.items()}
    for entry, place, own, label in zip(
        result.inputs, options.row, pictures, batch.labels.tolist(), strict=True
    ):
        entry["text"] = f"{example} {place} of {task.name}, labelled {classes[label]}"
        entry["picture"] = own
    _told(options, result, roles)


def patches(example: str, values: Any, config: Any) -> dict[str, Any]:
    """A picture of an input, and where its patches are: grey ``pixels`` in 0..255, ``rows`` and
    ``columns`` of patches in reading order, of which the tokens before ``first`` are none."""
    from torch.nn import functional as F

    if example == "image":  # [C, side, side]
        grey, first = values.mean(0), 1
        size, stride = config.patch_size, config.patch_size
        rows = columns = (grey.size(0) - size) // stride + 1
    else:  # [frames, bands]: a row per band, low ones at the top
        grey, first = values.T, 2
        rows = (grey.size(0) - config.patch_size) // config.frequency_stride + 1
        columns = (grey.size(1) - config.patch_size) // config.time_stride + 1
    most = max(grey.shape)
    if most > 128:
        small = (max(1, grey.size(0) * 128 // most), max(1, grey.size(1) * 128 // most))
        grey = F.adaptive_avg_pool2d(grey[None], small)[0]
    low, high = grey.min(), grey.max()
    pixels = ((grey - low) / (high - low).clamp(min=1e-6) * 255).round().int().tolist()
    return {"rows": rows, "columns": columns, "first": first, "pixels": pixels}


def _check_maps(options: argparse.Namespace) -> None:
    if len(options.maps) > 1 and any(isinstance(one, str) for one in options.maps):
        raise UsageError("--maps takes all, or none, or some LAYER:HEAD, not a mixture")


def _roles(options: argparse.Namespace) -> Any:
    """The document of --roles, or None."""
    import json

    roles = None
    if options.roles is not None:
        try:
            roles = json.loads(options.roles.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"there is no file {options.roles}") from None
        except (OSError, ValueError):
            raise UsageError(f"{options.roles} is not JSON from 'headwise explain'") from None
    return roles


def _explained(options: argparse.Namespace, model, inputs: Any, roles: Any, **named: Any):
    """``hw.explain`` with the options that all kinds of inputs have."""
    import headwise as hw

    chosen = options.maps
    try:
        return hw.explain(
            model,
            inputs,
            maps=chosen[0] if isinstance(chosen[0], str) else chosen,
            roles=roles,
            pairs=options.pairs,
            steps=options.steps,
            effects=False if options.no_effects else None,
            batch_size=options.batch_size,
            **named,
        )
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0]) from None


def _told(options: argparse.Namespace, result, roles: Any) -> None:
    """Prints and writes an explanation."""
    from headwise.io.files import write_json

    for position, entry in enumerate(result.inputs):
        say(("\n" if position else "") + render(entry, result.summary(position)))
    if len(result.inputs) > 1:
        say("\n" + render_differences(result.inputs[0], result.inputs[1], result.differences()))
    files = [options.json, None if options.out is None else options.out / "explanation.json"]
    for file in files:
        if file is not None:
            write_json(file, result.to_dict())
            say(f"\nwrote {file}")
    page_options.write(options, result, *([roles] if roles is not None else []))


def render(entry: dict[str, Any], summary: str, rows: int = 10) -> str:
    """A text's summary, the grid of heads, and the heads that matter most."""
    lines = [printable(entry["text"] or ""), "", printable(summary), ""]
    lines.append("layer  heads (x ran, . slept)")
    for layer in entry["layers"]:
        grid = "".join("x" if head["on"] else "." for head in layer["heads"])
        budget = layer["gate"]["budget"]
        asked = "" if budget is None else f"  budget {budget['value']:.2f}"
        if budget is not None and budget["attribution"] is not None:
            found = budget["attribution"]
            asked += f", {found['baseline']:.2f} for the average input"
        lines.append(f"{layer['site']:5}  {grid}{asked}")
    heads = [(layer["site"], head) for layer in entry["layers"] for head in layer["heads"]]
    if any(head["effect"] is not None for _, head in heads):
        heads.sort(key=lambda pair: -abs(pair[1]["effect"] or 0.0))
        title = f"the {min(rows, len(heads))} heads that matter most"
        lines += ["", f"{title}: effect on the log-probability of the prediction"]
        lines.append("layer head  ran  relevance  rank  margin   effect  looks at; chosen for")
        for site, head in heads[:rows]:
            lines.append(
                f"{site:5} {head['head']:4}  {'yes' if head['on'] else 'no ':3}"
                f"  {_number(head['relevance'], 9)}  {_whole(head['rank'], 4)}"
                f"  {_number(head['margin'], 6)}  {_number(head['effect'], 7, True)}"
                f"  {_pair(head, entry['tokens'])}{_share(head, entry['tokens'])}"
            )
    return "\n".join(lines)


def render_differences(
    first: dict[str, Any], second: dict[str, Any], found: list[dict[str, Any]], rows: int = 10
) -> str:
    """The first two inputs side by side: the heads that ran for one of them only."""
    title = f"{len(found)} of {first['heads']} heads ran for only one of the first two inputs"
    if not found:
        return title
    lines = [
        f"{title}: A, {printable(first['text'] or '', 60)}; "
        f"B, {printable(second['text'] or '', 60)}",
        "layer head  ran for  margin A  margin B  spoke for it; against it",
    ]
    for entry in found[:rows]:
        sides = [
            ", ".join(f"{printable(token, 30)} ({share:+.2f})" for token, share in entry[key])
            for key in ("spoke_for", "spoke_against")
        ]
        lines.append(
            f"{entry['site']:5} {entry['head']:4}  {'AB'[entry['ran_for']]:>7}"
            f"  {_number(entry['margins'][0], 8, True)}  {_number(entry['margins'][1], 8, True)}"
            f"  {sides[0] or '-'}; {sides[1] or '-'}"
        )
    if len(found) > rows:
        lines.append(f"and {len(found) - rows} more")
    return "\n".join(lines)


def _number(value: float | None, width: int, sign: bool = False) -> str:
    return "-".rjust(width) if value is None else f"{value:{'+' if sign else ''}{width}.3f}"


def _whole(value: int | None, width: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}}"


def _share(head: dict[str, Any], tokens: list[str] | None) -> str:
    """The token with the largest share in the head's relevance, and the share."""
    if not head["shares"] or tokens is None or len(tokens) != len(head["shares"]):
        return ""
    place = max(range(len(tokens)), key=lambda token: abs(head["shares"][token]))
    return f"; {printable(tokens[place], 30)} ({head['shares'][place]:+.3f})"


def _pair(head: dict[str, Any], tokens: list[str] | None) -> str:
    if not head["pairs"]:
        return "-"
    pair = head["pairs"][0]
    query, key = pair["query"], pair["key"]
    if tokens is not None and max(query, key) < len(tokens):
        names = [printable(tokens[place], 30) for place in (query, key)]
        return f"{' -> '.join(names)} ({pair['weight']:.2f})"
    return f"{query} -> {key} ({pair['weight']:.2f})"
