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
    positive,
    say,
    writable_outputs,
)
from headwise.apps.pages import options as page_options
from headwise.apps.tasks.errors import UsageError
from headwise.io.printable import printable, quoted

DESCRIPTION = """\
With --text: which heads of a trained text classifier run for each text, and why: relevance and its
share by token, margins, what each head looks at, and the measured effect of toggling it.
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
    what.add_argument("--data", type=Path, metavar="FILE", help="a data set: .csv or .jsonl")
    one = parser.add_argument_group("texts")
    of_text = [
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


def run(options: argparse.Namespace) -> None:
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
    import json

    import headwise as hw
    from headwise.apps.tasks.models import load_tokenizer
    from headwise.io.files import write_json

    chosen = options.maps
    if len(chosen) > 1 and any(isinstance(one, str) for one in chosen):
        raise UsageError("--maps takes all, or none, or some LAYER:HEAD, not a mixture")
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
    roles = None
    if options.roles is not None:
        try:
            roles = json.loads(options.roles.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"there is no file {options.roles}") from None
        except (OSError, ValueError):
            raise UsageError(f"{options.roles} is not JSON from 'headwise explain'") from None
    model, _ = loaded(options)
    tokenizer = load_tokenizer(options.model)
    try:
        result = hw.explain(
            model,
            options.text,
            tokenizer=tokenizer,
            maps=chosen[0] if isinstance(chosen[0], str) else chosen,
            roles=roles,
            pairs=options.pairs,
            steps=options.steps,
            effects=False if options.no_effects else None,
            max_length=options.max_length,
            batch_size=options.batch_size,
        )
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0]) from None
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
    """The first two texts side by side: the heads that ran for one of them only."""
    title = f"{len(found)} of {first['heads']} heads ran for only one of the first two texts"
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
