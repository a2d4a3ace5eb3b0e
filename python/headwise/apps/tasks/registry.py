"""The tasks that need no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.apps.tasks import corpora, images, speech, translation
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import AST, MARIAN, VIT, OwnModel
from headwise.apps.tasks.tasks import Task, task_from_file
from headwise.io.printable import quoted


@dataclass(frozen=True)
class Bundled:
    """A task by name: how it is loaded, and its model if that is no pretrained text encoder."""

    load: Callable[[], Task]
    model: OwnModel | None = None


DEFAULT_TASK = "reviews"
#: Those whose inputs are no texts, and that a trained classifier answers.
OF_TENSORS = ("digits", "speech")

BUNDLED: dict[str, Bundled] = {
    **{
        load.__name__.replace("_", "-"): Bundled(load)
        for load in (
            corpora.reviews,
            corpora.snippets,
            corpora.products,
            corpora.tweets,
            corpora.topics,
            corpora.thesaurus,
            corpora.docstrings,
            corpora.mixed,
            corpora.mixed_domains,
            corpora.instructions,
        )
    },
    "digits": Bundled(images.digits, VIT),
    "speech": Bundled(speech.speech, AST),
    "translation": Bundled(translation.translation, MARIAN),
}


def bundled(name: str) -> Bundled:
    """The task of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in BUNDLED:
        raise UsageError(f"task must be one of {', '.join(BUNDLED)}, got {quoted(name)}")
    return BUNDLED[name]


def load_task(name: str) -> Task:
    """One of the tasks that need no file.

    Raises:
        UsageError: the name is unknown, or the package with its data is not installed.
    """
    return bundled(name).load()


def load_data(path: Path, text: str, label: str, group: str | None) -> Task:
    """A user's task: images if the file is an ``.npz``, else texts, with the names of its columns.

    Raises:
        UsageError: the file cannot be used.
    """
    if _holds_images(path):
        if (text, label, group) != ("text", "label", None):
            raise UsageError(
                "--text, --label and --group are of texts; an .npz file has the arrays x and y"
            )
        return images.task_from_npz(path)
    return task_from_file(path, text, label, group)


def example_of(task: str | None, data: Path | None) -> str:
    """What an input of a task or a file is called: "text", "image" or "clip"."""
    if task is not None:
        return {"digits": "image", "speech": "clip"}[task]
    return "image" if data is not None and _holds_images(data) else "text"


def model_of(tasks: Sequence[str], data: Path | None) -> OwnModel | None:
    """The model that comes with the first of ``tasks``, or with ``data``; None: a text encoder.

    Raises:
        UsageError: a name is unknown.
    """
    if data is not None:
        return VIT if _holds_images(data) else None
    return bundled(tasks[0]).model


def _holds_images(path: Path) -> bool:
    return path.suffix.lower() == ".npz"
