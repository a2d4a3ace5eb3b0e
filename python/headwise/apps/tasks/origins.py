"""What the dense model of a study is before it learns the task: a pretrained text encoder, or a
small transformer without any training. It also says how the task's inputs reach the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.examples import Examples, PairExamples, TensorExamples, encode
from headwise.apps.tasks.models import (
    folder_digest,
    load_classifier,
    load_config,
    load_tokenizer,
    model_folder,
    model_name,
)
from headwise.apps.tasks.own_models import Classifier, Translator
from headwise.apps.tasks.shapes import Shape
from headwise.apps.tasks.tasks import Task, split
from headwise.apps.tasks.translation import train_tokenizer
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

    def size(self, task: Task) -> dict[str, int]:
        """The model's ``layers``, ``heads`` of all of them, and ``width``."""

    def max_length(self, wanted: int) -> int:
        """The most tokens of a text."""

    def shape(self, wanted: Shape) -> Shape:
        """The nearest shape that the model can be called with."""

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        """The given rows as the model takes them."""

    def model(self, task: Task) -> nn.Module:
        """The model, with a new head for the task's classes."""


def _size(config: Any) -> dict[str, int]:
    layers = config.num_hidden_layers
    heads = layers * config.num_attention_heads
    return {"layers": layers, "heads": heads, "width": config.hidden_size}


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

    def size(self, task: Task) -> dict[str, int]:
        return _size(self._config)

    def max_length(self, wanted: int) -> int:
        return longest(self._config, self.tokenizer, wanted) or wanted

    def shape(self, wanted: Shape) -> Shape:
        return wanted.within(positions(self._config))

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        return encode(task, rows, self.tokenizer, max_length)

    def model(self, task: Task) -> nn.Module:
        return load_classifier(self._folder, len(task.classes))


class Untrained:
    """A task's own small transformer, initialised from the current seed. Its inputs have one size,
    so lengths mean nothing to it."""

    tokenizer = None

    def __init__(self, model: Classifier, task: Task):
        self._model = model
        self.name = model.name
        self.digest = fingerprint(self.config(task).to_dict())

    def config(self, task: Task) -> Any:
        """The model's configuration, of transformers."""
        return self._model.config(task.inputs, len(task.classes))

    def size(self, task: Task) -> dict[str, int]:
        return _size(self.config(task))

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

    def model(self, task: Task) -> nn.Module:
        model = self._model.build(self.config(task))
        names = dict(enumerate(task.classes))
        model.config.id2label = names
        model.config.label2id = {name: number for number, name in names.items()}
        return model


class UntrainedTranslator:
    """A task's own small encoder-decoder, initialised from the current seed. Its tokenizer learns
    from the training messages."""

    def __init__(self, model: Translator, task: Task, seed: int):
        self._model = model
        self.name = model.name
        texts = [
            text
            for row in split(task, seed).train
            for text in (task.inputs[row], task.targets[row])
        ]
        self.tokenizer = train_tokenizer(texts)
        self._config = model.config(
            len(self.tokenizer), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        )
        self.digest = fingerprint(
            [self._config.to_dict(), sorted(self.tokenizer.get_vocab().items())]
        )

    def size(self, task: Task) -> dict[str, int]:
        config = self._config
        layers, deeper = config.encoder_layers, config.decoder_layers
        heads = layers * config.encoder_attention_heads
        heads += 2 * deeper * config.decoder_attention_heads  # its own, and cross-attention
        return {"layers": layers + deeper, "heads": heads, "width": config.d_model}

    def max_length(self, wanted: int) -> int:
        return min(wanted, self._config.max_position_embeddings)

    def shape(self, wanted: Shape) -> Shape:
        return Shape(wanted.batch)

    def examples(self, task: Task, rows: Sequence[int], max_length: int) -> Examples:
        def encoded(texts: Sequence[str]) -> list[list[int]]:
            cut = self.tokenizer(
                [texts[row] for row in rows], truncation=True, max_length=max_length
            )
            return cut["input_ids"]

        return PairExamples(
            encoded(task.inputs), encoded(task.targets), self.tokenizer.pad_token_id, self.tokenizer
        )

    def model(self, task: Task) -> nn.Module:
        return self._model.build(self._config)


def origin_of(tasks: Sequence[Task], folder: Path | None, seed: int = 0) -> Origin:
    """The origin of the dense model of all of ``tasks``.

    Args:
        seed: of the data's split: a tokenizer learns from the training part alone.
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
    if isinstance(own.model, Translator):
        return UntrainedTranslator(own.model, own, seed)
    assert isinstance(own.model, Classifier)
    return Untrained(own.model, own)
