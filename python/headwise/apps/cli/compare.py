"""``headwise compare``: static against dynamic head selection, on a real model and task."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from headwise.apps.cli.common import (
    add_common,
    add_energy,
    energy_windows,
    positive,
    say,
    seed,
    share,
    use_device,
    use_threads,
    writable_file,
)
from headwise.apps.compare.metrics import METRICS
from headwise.apps.compare.settings import ACCURACY, BLEU
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import OwnModel, Translator
from headwise.apps.tasks.registry import BUNDLED, DEFAULT_TASK, model_of

DESCRIPTION = """\
Fine-tunes a model on a task, then lets every method cut its attention heads to the same average
number with the same training steps, and compares accuracy and measured time on the test inputs.
Prints a table and writes results.json, index.html and figures to --out. Every finished run is kept
there at once: the same command, given again, resumes where an interrupted one stopped.
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "compare",
        help="compare static with dynamic head selection on a model and a task",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="one budget, four methods: minutes on 2 cores"
    )
    size.add_argument(
        "--full", action="store_true", help="three seeds, all training inputs: hours on 2 cores"
    )
    what = parser.add_argument_group("task and model")
    what.add_argument(
        "--task",
        "--tasks",
        dest="tasks",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(BUNDLED)} (default: {DEFAULT_TASK})",
    )
    what.add_argument(
        "--data", type=Path, metavar="FILE", help="own texts: .csv or .jsonl; own images: .npz"
    )
    what.add_argument("--text", default="text", metavar="COLUMN", help="default: text")
    what.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    what.add_argument(
        "--group", metavar="COLUMN", help="rows with the same value stay in one part of the split"
    )
    what.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a text encoder of transformers that docs/convert.md lists "
        "(default: all-MiniLM-L6-v2)",
    )
    how = parser.add_argument_group("what is compared")
    how.add_argument(
        "--keep", nargs="+", type=share, metavar="SHARE", help="shares of the heads, in (0, 1]"
    )
    how.add_argument("--methods", nargs="+", metavar="NAME", help="see --list-methods; or all")
    how.add_argument("--seeds", nargs="+", type=seed, metavar="N", help="one training of each")
    how.add_argument("--steps", type=positive, metavar="N", help="training steps of each method")
    how.add_argument(
        "--dense-steps", type=positive, metavar="N", help="steps in which the dense model learns"
    )
    how.add_argument(
        "--score-limit",
        type=positive,
        metavar="N",
        help="training inputs that heads are scored and repaired on (default: 512, with --quick "
        "256, with --full 1024)",
    )
    how.add_argument(
        "--batch-size", type=positive, metavar="N", help="inputs per step (default: 32)"
    )
    how.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of a text (default: 48)"
    )
    how.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of training and accuracy; latency is always measured in float32",
    )
    how.add_argument(
        "--metric",
        choices=(ACCURACY, *METRICS),
        help="what methods are compared by, beside accuracy: macro F1, Matthews correlation, or of "
        "translations BLEU (default: accuracy; of translations bleu)",
    )
    add_energy(how)
    how.add_argument("--list-methods", action="store_true", help="print the methods and stop")
    parser.add_argument(
        "--keep-models", action="store_true", help="write every trained model to OUT/models"
    )
    add_common(parser, out="headwise-out")
    return parser


def settings_of(options: argparse.Namespace):
    """The settings that the options ask for."""
    from headwise.apps.compare.methods import (
        DEFAULT_METHODS,
        FULL_METHODS,
        QUICK_METHODS,
        resolve_methods,
    )
    from headwise.apps.compare.settings import check_keep, preset

    size = "quick" if options.quick else "full" if options.full else "default"
    model = model_of(options.tasks or (DEFAULT_TASK,), options.data)
    settings = preset(size, options.seed).for_model(model)
    if isinstance(model, Translator):
        if options.energy:
            raise UsageError(f"--energy is for encoders, not for a {model.name}")
    elif model is not None and options.max_length is not None:
        raise UsageError(f"--max-length is of texts; the inputs of a {model.name} have one size")
    standard = {"quick": QUICK_METHODS, "default": DEFAULT_METHODS, "full": FULL_METHODS}[size]
    changes: dict = {
        "energy": energy_windows(options),
        "metric": _metric(options.metric, model),
        "methods": resolve_methods(tuple(options.methods or standard), model),
    }
    if options.keep:
        changes["keep"] = check_keep(tuple(options.keep))
    if options.seeds:
        changes["seeds"] = tuple(dict.fromkeys(options.seeds))
    for name in ("steps", "dense_steps", "score_limit", "max_length"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    training = settings.training
    if options.batch_size is not None:
        training = replace(training, batch_size=options.batch_size)
    if options.precision is not None:
        training = replace(training, precision=options.precision)
    return replace(settings, training=training, **changes)


def _metric(wanted: str | None, model: OwnModel | None) -> str:
    translates = isinstance(model, Translator)
    if wanted is None:
        return BLEU if translates else ACCURACY
    if translates != (wanted == BLEU):
        what = "translations are compared by bleu" if translates else "bleu is of translations"
        raise UsageError(f"{what}: leave out --metric {wanted}")
    return wanted


def run(options: argparse.Namespace) -> None:
    from headwise.apps.cli.common import need_packages, own_folder, writable_folder
    from headwise.apps.compare.methods import METHODS

    if options.list_methods:
        for method in METHODS.values():
            say(f"{method.name:24}{method.kind:9}{method.title}")
        return
    if options.data is not None and options.tasks:
        raise UsageError("give --data or --task, not both")
    if options.data is None:
        for name, default in (("text", "text"), ("label", "label"), ("group", None)):
            if getattr(options, name) != default:
                raise UsageError(f"--{name} names a column of own data, so it needs --data")
    need_packages("compare", ("matplotlib", "jinja2", "plotly"), "compare")
    settings = settings_of(options)
    if settings.metric != ACCURACY:
        package = METRICS[settings.metric].package
        need_packages(f"--metric {settings.metric}", (package,), "compare")
    writable_file(options.json)
    writable_folder(options.out)
    device = use_device(options.device)
    threads = use_threads(options.threads)

    from headwise.apps.compare.progress import Progress
    from headwise.apps.compare.settings import Source
    from headwise.apps.compare.study import Study

    source = Source(
        tasks=tuple(dict.fromkeys(options.tasks or (DEFAULT_TASK,))),
        data=options.data,
        text=options.text,
        label=options.label,
        group=options.group,
        model=options.model,
    )
    study = Study(
        source,
        settings,
        options.out,
        device=device,
        threads=threads,
        progress=Progress(),
        keep_models=options.keep_models,
    )
    with own_folder(options.out):
        _run(options, study)


def _run(options: argparse.Namespace, study) -> None:
    from headwise.apps.compare import report
    from headwise.apps.compare.table import render
    from headwise.io.files import write_json

    try:
        result = report.complete(study.run())
    except KeyboardInterrupt:
        say(
            f"headwise compare: interrupted; finished runs are kept in {options.out}, and the "
            "same command resumes from there",
            file=sys.stderr,
        )
        raise
    say(render(result))
    files = report.write(result, options.out)
    if options.json is not None:
        write_json(options.json, report.public(result))
    say(f"\nwrote {', '.join(file.name for file in files)} to {options.out}")
