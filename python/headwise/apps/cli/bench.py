"""``headwise bench``: what choosing heads costs on this machine."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from headwise.apps.cli.common import (
    add_common,
    add_energy,
    energy_windows,
    positive,
    say,
    share,
    use_device,
    use_threads,
    writable_file,
)
from headwise.apps.tasks.errors import UsageError
from headwise.io.printable import quoted

WHAT = ("layer", "train", "scaling", "gate", "tokens", "decode", "entropy", "model")
DTYPES = ("float64", "float32", "bfloat16", "float16")

DESCRIPTION = """\
Times layers and models whose inputs choose their heads, gate included, relative to those that
physically have the same number of heads, and reports which goals are met. Every contender is
checked against the oracle (compute every head, weight, project) first; contenders alternate.

  layer    one layer's forward: a quarter, half, three quarters and all of the heads, and budgets
           that differ within the batch; memory
  train    one layer's forward and backward, running the chosen heads only
  scaling  one layer's forward on one thread and on more
  gate     gates alone, over the dense layer
  tokens   one layer's forward with heads chosen by every token, over the layer with the
           same number of heads and over every head, masked
  decode   a step of a decoder with a cache of B,L: converted over unconverted, a third of the
           key/value heads kept by the prompt over the model pruned to the same number; cache memory
  entropy  attention_entropy over scaled_dot_product_attention; memory
  model    a model with gates over the statically pruned one, on real texts
"""


def shape(text: str):
    """B,L,D,H."""
    from headwise.apps.bench.contenders import Shape

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) <= 0:
        raise argparse.ArgumentTypeError(
            f"expected B,L,D,H, four positive numbers, got {quoted(text)}"
        )
    if sizes[2] % sizes[3]:
        raise argparse.ArgumentTypeError(f"H must divide D, got D={sizes[2]} and H={sizes[3]}")
    return Shape(*sizes)


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="time layers and models whose inputs choose their heads",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="+", choices=WHAT, metavar="WHAT", help="any of " + ", ".join(WHAT)
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--shapes", nargs="+", type=shape, metavar="B,L,D,H", help="default: those of the docs"
    )
    what.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        help="default: float32 bfloat16",
    )
    what.add_argument(
        "--fractions", nargs="+", type=share, metavar="SHARE", help="of the heads that run"
    )
    what.add_argument("--gates", nargs="+", metavar="TYPE", help="of bench gate")
    what.add_argument(
        "--compiled",
        action="store_true",
        help="also torch.compile of the dense layer, and FlexAttention (minutes of compiling)",
    )
    what.add_argument("--no-mixed", action="store_true", help="no budgets that differ in a batch")
    what.add_argument("--no-memory", action="store_true", help="no peak memory")
    what.add_argument(
        "--break-even",
        action="store_true",
        help="also look for the batch and length from which half of the heads pay",
    )
    model = parser.add_argument_group("bench model")
    model.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a text encoder of transformers that docs/convert.md lists "
        "(default: all-MiniLM-L6-v2)",
    )
    model.add_argument(
        "--data", type=Path, metavar="FILE", help="texts: .csv or .jsonl (default: film reviews)"
    )
    model.add_argument("--text", default="text", metavar="COLUMN", help="default: text")
    model.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    model.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    model.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--rounds", type=positive, default=11, metavar="N", help="default: 11")
    how.add_argument(
        "--most-seconds",
        type=positive,
        metavar="S",
        help="rounds of one case end after so long, three in any case (default: no limit)",
    )
    how.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: processor time of all threads, for machines that others use too",
    )
    add_energy(how)
    how.add_argument("--note", metavar="TEXT", help="stored in the results")
    add_common(parser, out=None, several_threads=True)
    return parser


def run(options: argparse.Namespace) -> None:
    from headwise.apps.bench import report
    from headwise.apps.bench.contenders import CheckFailed
    from headwise.apps.cli.common import writable_folder
    from headwise.apps.compare.measure import environment
    from headwise.io.files import write_json

    writable_file(options.json)
    if options.out is not None:
        writable_folder(options.out)
    settings = settings_of(options)
    about = environment(settings.device, max(settings.threads)) | {
        "threads": list(settings.threads),
        "load": report.load(),
        **({"note": options.note} if options.note else {}),
    }
    for text in report.header(about):
        say(text)
    results = []
    try:
        for result in results_of(options.what, settings):
            results.append(result)
            say(report.line(result))
            for text in report.energy(result):
                say(text)
    except CheckFailed as failed:
        raise RuntimeError(str(failed)) from None
    found = report.document(settings, results, about)
    for text in report.closing(found["goals"]):
        say(text)
    if options.json is not None:
        write_json(options.json, found)
    if options.out is not None:
        what = list(dict.fromkeys(options.what))
        path = options.out / (f"bench-{what[0]}.json" if len(what) == 1 else "bench.json")
        write_json(path, found)
        say(f"\nwrote {path}")


def settings_of(options: argparse.Namespace):
    """The settings that the options ask for."""
    import torch

    from headwise.apps.bench import gate
    from headwise.apps.bench.settings import FRACTIONS, SHAPES, Settings

    threads = tuple(dict.fromkeys(options.threads or [use_threads(None)]))
    settings = Settings(
        device=use_device(options.device),
        shapes=tuple(options.shapes or SHAPES),
        dtypes=tuple(getattr(torch, name) for name in dict.fromkeys(options.dtype)),
        threads=threads,
        fractions=tuple(options.fractions or FRACTIONS),
        rounds=options.rounds,
        most_seconds=options.most_seconds,
        clock=options.clock,
        seed=options.seed,
        compiled=options.compiled,
        mixed=not options.no_mixed,
        memory=not options.no_memory,
        break_even=options.break_even,
        gates=tuple(options.gates or gate.GATES),
        model=options.model,
        data=options.data,
        text=options.text,
        label=options.label,
        max_length=options.max_length,
        batch_size=options.batch_size,
        energy=energy_windows(options),
    )
    if "gate" in options.what:
        first, dtype = settings.shapes[0], settings.dtypes[0]
        for name in settings.gates:
            try:
                gate.build(name, first, settings.device, dtype)
            except (TypeError, ValueError) as error:
                raise UsageError(f"cannot build the gate {quoted(name)}: {error}") from None
    return settings


def results_of(what: list[str], settings) -> Iterator[dict]:
    """One result after the other."""
    for name in dict.fromkeys(what):
        if name in ("layer", "train"):
            from headwise.apps.bench import layer

            yield from layer.run(settings, training=name == "train")
        else:
            yield from importlib.import_module(f"headwise.apps.bench.{name}").run(settings)
