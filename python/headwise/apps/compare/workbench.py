"""A task, a model trained on it, and the common data of the methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.settings import Settings
from headwise.apps.compare.training import (
    TrainingOptions,
    autocast,
    finetune,
    graded,
    logits_of,
    losses_of,
    precision_of,
    predict,
)
from headwise.apps.tasks.examples import Batch, Examples, PairExamples
from headwise.nn.layers import attention_layers


@dataclass
class Workbench:
    """The starting point of every method.

    Attributes:
        dense: the transformers model, trained on the task; never changed.
        plans: plans that several methods share.
        seed: of this run's training; the data's split does not depend on it.
        step_done: called after every training step, of any method.
    """

    task: str
    dense: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    settings: Settings
    seed: int
    device: torch.device
    folder: Path
    step_done: Callable[[], None] = lambda: None
    plans: dict = field(default_factory=dict)
    _scores: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Logits of whole vocabularies are too many to keep.
        self._taught = None if self.translates else self._ask_teacher()
        self.dense_layers = {
            name: layer.num_heads for name, layer in attention_layers(self.converted()).items()
        }

    @property
    def translates(self) -> bool:
        """Whether the model makes texts of texts."""
        return isinstance(self.train, PairExamples)

    @torch.no_grad()
    def teacher(self, batch: Batch) -> Tensor:
        """The dense model's logits for a training batch of :meth:`batches`."""
        if self._taught is not None:
            return self._taught[batch.rows].to(self.device)
        return self.forward(self.dense.eval(), batch)

    def _ask_teacher(self) -> Tensor:
        """[N, C], the dense model's logits for the training examples that the steps will show; the
        rest is not a number."""
        # Every method sees the same batches, so only their inputs are needed.
        batches = self.batches()
        shown = torch.cat([next(batches).rows for _ in range(self.settings.steps)]).unique()
        logits = predict(
            self.dense,
            self.train.rows(shown.tolist()),
            device=self.device,
            precision=self.settings.training.precision,
            read=lambda logits, _: logits,
        )
        teacher = torch.full((len(self.train), logits.size(1)), float("nan"))
        teacher[shown] = logits
        return teacher

    @property
    def num_heads(self) -> int:
        """Heads of the whole model."""
        return sum(self.dense_layers.values())

    def converted(self) -> nn.Module:
        """A copy of the dense model whose attention is headwise's, without gates."""
        return hw.convert(copy.deepcopy(self.dense))

    def gated(self, gate: hw.Gate) -> nn.Module:
        """The same with ``gate`` in every layer. A decoder's choose by its first token, for the
        whole text."""
        return hw.convert(self.converted(), gate, keep_selection=self.translates or None)

    def batches(self, seed_offset: int = 0) -> Iterator[Batch]:
        """Endless training batches: the same for every method of a seed."""
        return self.train.shuffled(
            self.settings.training.batch_size, seed=1000 * self.seed + 7 + seed_offset
        )

    def finetune(self, model: nn.Module, batches: Iterator[Batch], steps: int, **spans) -> None:
        """Some steps of a method's training, with the dense model as the teacher."""
        finetune(
            model,
            batches,
            steps,
            self.settings.training,
            device=self.device,
            teacher=self.teacher,
            after_step=self.step_done,
            **spans,
        )

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C], or of tokens [B, T, C], in the precision of training."""
        batch = batch.to(self.device)
        with autocast(precision_of(self.settings.training.precision, self.device), self.device):
            return logits_of(model, batch.inputs).float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each input, [B]."""
        return losses_of(self.forward(model, batch), batch.labels.to(self.device))

    def scoring_batches(self) -> Iterator[Batch]:
        """The training inputs that heads are scored on, once."""
        return self.train.take(self.settings.score_limit).in_order(32)

    def scores(self, absolute: str = "per_token") -> dict:
        """Head scores of the dense model: michel and entropy, on training inputs.

        Computed once: the plans of all budgets come from them.

        Args:
            absolute: that of :func:`headwise.score_heads`.
        """
        if absolute not in self._scores:
            self._scores[absolute] = hw.score_heads(
                self.converted().eval(),
                self.scoring_batches(),
                self.losses,
                metrics=["michel", "entropy"],
                absolute=absolute,
            )
        return self._scores[absolute]

    def errors(self, model: nn.Module, batch: Batch) -> Tensor:
        """Whether the prediction for each input is wrong, [B]: 0.0 or 1.0; of several tokens the
        share of wrong ones."""
        return 1.0 - graded(self.forward(model, batch), batch.labels.to(self.device))[:, 0]


def dense_options(settings: Settings) -> TrainingOptions:
    """The training of the dense model: no teacher, dropout as pretrained. Without pretraining the
    embeddings learn too."""
    return replace(
        settings.training,
        learning_rate=settings.dense_learning_rate,
        distillation=0.0,
        dropout=True,
        freeze_embeddings=settings.training.freeze_embeddings and not settings.from_scratch,
    )
