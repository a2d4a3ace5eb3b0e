"""What the dense model of a study is before it learns the task: a pretrained text encoder, or a
small transformer without any training. It also says how the task's inputs reach the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.examples import Examples, TensorExamples, encode
from headwise.apps.tasks.models import (
    folder_digest,
    load_classifier,
    load_config,
    load_tokenizer,
    model_folder,
    model_name,
)
from headwise.apps.tasks.own_models import OwnModel
from headwise.apps.tasks.shapes import Shape
from headwise.apps.tasks.tasks import Task
from headwise.explain.texts import longest, positions
from headwise.io.fingerprint import fingerprint


class Origin(Protocol):
    """Where the dense model of some tasks comes from.

    Attributes:
        name: of the model, in results.
        digest: another model has another one.
        tokenizer: saved with the models; None if there is none.
    """

    name: str
    digest: str
    tokenizer: Any

    def config(self, task: Task) -> Any:
        """The model's configuration, of transformers."""

    def max_length(self, wanted: int) -> int:
        """The most tokens of a text."""

    def shape(self, wanted: Shape) -> Shape:
        """The nearest shape that the model can be called with."""

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        """The given rows as the model takes them."""

    def classifier(self, task: Task) -> nn.Module:
        """The model, with a new head for the task's classes."""


class Pretrained:
    """A text encoder in a folder; None: the bundled one.

    Raises:
        UsageError: the folder lacks something, or cannot be loaded.
    """

    def __init__(self, given: Path | None):
        self._folder = model_folder(given)
        self.name = model_name(given)
        self.tokenizer = load_tokenizer(self._folder)
        self.digest = folder_digest(self._folder)
        self._config = load_config(self._folder)

    def config(self, task: Task) -> Any:
        return self._config

    def max_length(self, wanted: int) -> int:
        return longest(self._config, self.tokenizer, wanted) or wanted

    def shape(self, wanted: Shape) -> Shape:
        return wanted.within(positions(self._config))

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        return encode(task, rows, self.tokenizer, max_length)

    def classifier(self, task: Task) -> nn.Module:
        return load_classifier(self._folder, len(task.classes))


class Untrained:
    """A task's own small transformer, initialised from the current seed. Its inputs have one size,
    so lengths mean nothing to it."""

    tokenizer = None

    def __init__(self, model: OwnModel, task: Task):
        self._model = model
        self.name = model.name
        self.digest = fingerprint(self.config(task).to_dict())

    def config(self, task: Task) -> Any:
        return self._model.config(task.inputs, len(task.classes))

    def max_length(self, wanted: int) -> int:
        return wanted

    def shape(self, wanted: Shape) -> Shape:
        return Shape(wanted.batch)

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        rows = list(rows)
        return TensorExamples(
            self._model.argument,
            task.inputs[rows],
            [task.labels[row] for row in rows],
            self._model.positions(self.config(task)),
            task.domains,
            [task.domain_of[row] for row in rows] if task.domains else None,
        )

    def classifier(self, task: Task) -> nn.Module:
        return self._model.build(self.config(task))


def origin_of(tasks: Sequence[Task], folder: Path | None) -> Origin:
    """The origin of the dense model of all of ``tasks``.

    Args:
        folder: of a text encoder; None: the bundled one.

    Raises:
        UsageError: the tasks have different models, or a folder is given for a task that has its
            own.
    """
    own = next((task for task in tasks if task.model is not None), None)
    if own is None or own.model is None:
        return Pretrained(folder)
    if len(tasks) > 1:
        raise UsageError(
            f"the task {own.name} has a model of its own: give it alone, not with "
            + ", ".join(task.name for task in tasks if task is not own)
        )
    if folder is not None:
        raise UsageError(f"the task {own.name} trains a model of its own: leave out --model")
    return Untrained(own.model, own)
