"""Labelled texts and a trained classifier, for ``score`` and ``prune``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.apps.cli.common import add_labels_are, positive
from headwise.apps.tasks.errors import UsageError


def add_texts(
    parser: argparse.ArgumentParser, required: bool
) -> tuple[list[argparse.Action], argparse.Action]:
    """The options for the texts and their number, and the one for a search's finished steps."""
    add = parser.add_argument
    texts = [
        add(
            "--data",
            type=Path,
            required=required,
            metavar="FILE",
            help="labelled texts: .csv or .jsonl",
        ),
        add("--text", default="text", metavar="COLUMN", help="default: text"),
        add("--label", default="label", metavar="COLUMN", help="default: label"),
        add_labels_are(parser),
        add("--limit", type=positive, default=512, metavar="N", help="texts (default: 512)"),
        add("--batch-size", type=positive, default=32, metavar="N", help="default: 32"),
        add("--max-length", type=positive, default=128, metavar="N", help="tokens"),
    ]
    journal = add(
        "--journal",
        type=Path,
        metavar="DIR",
        help="save the finished steps of long searches there; the same command resumes from them",
    )
    return texts, journal


@dataclass(frozen=True)
class LabelledTexts:
    """The input of a search over the heads of a model.

    Attributes:
        name: of the file.
        count: of texts.
        batches: encoded texts.
        loss: (model, batch) -> cross entropy of each text [B].
        logits: (model, batch) -> [B, C].
    """

    name: str
    count: int
    batches: list
    loss: Callable[[Any, Any], Any]
    logits: Callable[[Any, Any], Any]


def labelled_texts(options: argparse.Namespace, model, device) -> LabelledTexts:
    """Reads and encodes the texts that ``options`` name, for ``model``.

    Raises:
        UsageError: a file that cannot be used, or labels that the model does not know.
    """
    import random

    from torch.nn import functional as F

    from headwise.apps.tasks.examples import encode
    from headwise.apps.tasks.models import load_tokenizer
    from headwise.apps.tasks.tasks import task_from_file
    from headwise.explain.texts import longest

    task = task_from_file(options.data, options.text, options.label, least=1)
    classes = model.config.num_labels
    if len(task.classes) > classes:
        raise UsageError(
            f"{options.data} has {len(task.classes)} different labels, but the model in "
            f"{options.model} was trained for {classes}"
        )
    task = task.with_labels_of(model.config.label2id, options.labels_are)
    rows = list(range(len(task)))
    random.Random(options.seed).shuffle(rows)
    tokenizer = load_tokenizer(options.model)
    length = longest(model.config, tokenizer, options.max_length)
    examples = encode(task, rows[: options.limit], tokenizer, length)

    def logits(model, batch):
        batch = batch.to(device)
        return model(**batch.inputs).logits.float()  # [B, C]

    def loss(model, batch):
        labels = batch.labels.to(device)
        return F.cross_entropy(logits(model, batch), labels, reduction="none")  # [B]

    batches = list(examples.in_order(options.batch_size))
    return LabelledTexts(options.data.name, len(examples), batches, loss, logits)


def journal(options: argparse.Namespace, search: str) -> Path | None:
    """The file for the steps of ``search``, if --journal was given."""
    from headwise.apps.cli.common import writable_folder

    if options.journal is None:
        return None
    writable_folder(options.journal)
    return options.journal / f"{search}.jsonl"
