"""Labelled texts, images or sounds and a trained classifier, for ``score`` and ``prune``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.apps.cli.common import add_labels_are, positive
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.registry import OF_TENSORS, example_of

if TYPE_CHECKING:
    from headwise.apps.tasks.examples import Examples, TensorExamples
    from headwise.apps.tasks.tasks import Task


def add_task(parser) -> argparse.Action:
    """The option for images and sounds that come with headwise."""
    return parser.add_argument(
        "--task",
        choices=OF_TENSORS,
        help="instead of --data: the images or sounds of this task, for a model that 'headwise "
        "compare --task' trained on them",
    )


def add_texts(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], argparse.Action]:
    """The options for the texts and their number, and the one for a search's finished steps."""
    add = parser.add_argument
    texts = [
        add(
            "--data",
            type=Path,
            metavar="FILE",
            help="labelled texts: .csv or .jsonl; images: .npz",
        ),
        add_task(parser),
        add("--text", default="text", metavar="COLUMN", help="default: text"),
        add("--label", default="label", metavar="COLUMN", help="default: label"),
        add_labels_are(parser),
        add("--limit", type=positive, default=512, metavar="N", help="inputs (default: 512)"),
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
        name: of the file, or the task.
        example: what an input is called: "text", "image" or "clip".
        count: of inputs.
        batches: of inputs, as the model takes them.
        loss: (model, batch) -> cross entropy of each input [B].
        logits: (model, batch) -> [B, C].
    """

    name: str
    example: str
    count: int
    batches: list
    loss: Callable[[Any, Any], Any]
    logits: Callable[[Any, Any], Any]


def one_source(options: argparse.Namespace) -> None:
    """Raises an error unless --data or --task says what the inputs are, and the options fit it.

    Raises:
        UsageError: neither or both, or options of texts for something else.
    """
    if (options.data is None) == (options.task is None):
        raise UsageError("give --data FILE or --task NAME, one of the two")
    if example_of(options.task, options.data) != "text":
        for name, default in (("text", "text"), ("label", "label"), ("max_length", 128)):
            if getattr(options, name, default) != default:
                raise UsageError(
                    f"--{name.replace('_', '-')} is of texts, not of images and sounds"
                )


def tensor_task(options: argparse.Namespace, model) -> Task:
    """The images or sounds that ``options`` name, in the class numbers of ``model``.

    Raises:
        UsageError: a file that cannot be used, inputs that the model does not take, or labels that
            it does not know.
    """
    from headwise.apps.tasks.images import task_from_npz
    from headwise.apps.tasks.registry import load_task

    task = load_task(options.task) if options.task else task_from_npz(options.data)
    _check_classes(options, model, task)
    config, shape = model.config, list(task.inputs.shape[1:])
    if task.example == "image":
        side = config.image_size
        wanted = [config.num_channels, *([side, side] if isinstance(side, int) else side)]
    else:
        wanted = [getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)]
    if shape != wanted:
        raise UsageError(
            f"the model in {options.model} takes {task.example}s of shape {wanted}, but those of "
            f"{task.name} have {shape}"
        )
    return task.with_labels_of(config.label2id, options.labels_are)


def tensor_examples(task: Task, rows: Sequence[int], model) -> TensorExamples:
    """The given rows of :func:`tensor_task`."""
    from headwise.apps.tasks.examples import TensorExamples
    from headwise.apps.tasks.own_models import Classifier

    rows = list(rows)
    own = task.model
    assert isinstance(own, Classifier)
    return TensorExamples(
        own.argument, task.inputs[rows], [task.labels[row] for row in rows],
        own.positions(model.config),
    )  # fmt: skip


def _check_classes(options: argparse.Namespace, model, task: Task) -> None:
    classes = model.config.num_labels
    if len(task.classes) > classes:
        raise UsageError(
            f"{options.data or options.task} has {len(task.classes)} different labels, but the "
            f"model in {options.model} was trained for {classes}"
        )


def labelled_texts(options: argparse.Namespace, model, device) -> LabelledTexts:
    """Reads and encodes the texts, images or sounds that ``options`` name, for ``model``.

    Raises:
        UsageError: a file that cannot be used, or labels that the model does not know.
    """
    import random

    from torch.nn import functional as F

    from headwise.apps.tasks.examples import encode
    from headwise.apps.tasks.models import load_tokenizer
    from headwise.apps.tasks.tasks import split, task_from_file
    from headwise.explain.texts import longest

    examples: Examples
    if example_of(options.task, options.data) == "text":
        task = task_from_file(options.data, options.text, options.label, least=1)
        _check_classes(options, model, task)
        task = task.with_labels_of(model.config.label2id, options.labels_are)
        rows = list(range(len(task)))
        random.Random(options.seed).shuffle(rows)
        tokenizer = load_tokenizer(options.model)
        length = longest(model.config, tokenizer, options.max_length)
        examples = encode(task, rows[: options.limit], tokenizer, length)
    else:
        task = tensor_task(options, model)
        # Of a bundled task the rows that 'headwise compare' scores on, not those of its test.
        rows = list(split(task, options.seed).train if options.task else range(len(task)))
        random.Random(options.seed).shuffle(rows)
        examples = tensor_examples(task, rows[: options.limit], model)

    def logits(model, batch):
        batch = batch.to(device)
        return model(**batch.inputs).logits.float()  # [B, C]

    def loss(model, batch):
        labels = batch.labels.to(device)
        return F.cross_entropy(logits(model, batch), labels, reduction="none")  # [B]

    batches = list(examples.in_order(options.batch_size))
    name = options.task or options.data.name
    return LabelledTexts(name, task.example, len(examples), batches, loss, logits)


def journal(options: argparse.Namespace, search: str) -> Path | None:
    """The file for the steps of ``search``, if --journal was given."""
    from headwise.apps.cli.common import writable_folder

    if options.journal is None:
        return None
    writable_folder(options.journal)
    return options.journal / f"{search}.jsonl"
