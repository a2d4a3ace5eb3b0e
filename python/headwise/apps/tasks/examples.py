"""Rows of a task as a model takes them, and the batches made of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.tasks import Task
from headwise.explain.texts import check_length


@dataclass(frozen=True)
class Batch:
    """The input and the labels of a model.

    Attributes:
        rows: int64 [B], positions in the :class:`Examples` that the batch was drawn from.
        inputs: the model's keyword arguments, each [B, ...].
        labels: int64 [B]; of texts that are to be generated [B, T], with ``IGNORED`` after each.
    """

    rows: Tensor
    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(self.rows, inputs, self.labels.to(device))


#: The label of padding.
IGNORED = -100

Own = TypeVar("Own", bound="Examples")


class Examples(ABC):
    """Inputs and labels of some rows of a task.

    Attributes:
        labels: int64 [N].
        domains: names of the task's domains; empty if it has one.
        domain_of: int64 [N], each row's, or None.
    """

    def __init__(
        self,
        labels: Sequence[int],
        domains: Sequence[str] = (),
        domain_of: Sequence[int] | None = None,
    ):
        self.labels = torch.tensor(list(labels), dtype=torch.long)
        self.domains = tuple(domains)
        self.domain_of = torch.tensor(list(domain_of or ()), dtype=torch.long) if domains else None

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Positions (tokens, patches) of each example in the model, N."""

    @abstractmethod
    def positions_of(self, inputs: dict[str, Tensor]) -> Tensor:
        """Positions of each input of a batch, int64 [B]."""

    @abstractmethod
    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's keyword arguments for the given rows, each [B, ...]."""

    @abstractmethod
    def rows(self: Own, rows: Sequence[int]) -> Own:
        """The examples at the given positions."""

    def of_length(self, rows: Sequence[int], length: int) -> dict[str, Tensor]:
        """The same with exactly ``length`` positions each, for measuring.

        Raises:
            ValueError: the examples all have one size.
        """
        raise ValueError(f"length must be None for inputs of one size, got {length}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self: Own, limit: int | None) -> Own:
        """The first ``limit`` examples; all if it is None."""
        if limit is None or limit >= len(self):
            return self
        return self.rows(range(limit))

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return Batch(index, self.collate(rows), self.labels_of(rows))

    def labels_of(self, rows: Sequence[int]) -> Tensor:
        """The labels of the given rows, as a batch has them."""
        return self.labels[list(rows)]

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, shortest first, so that padding is rare."""
        lengths = self.lengths
        rows = sorted(range(len(self)), key=lambda row: lengths[row])
        for start in range(0, len(rows), batch_size):
            yield self.batch(rows[start : start + batch_size])

    def shuffled(self, batch_size: int, seed: int, bucket: int = 16) -> Iterator[Batch]:
        """Endless full batches, each epoch in a new order.

        Lengths are sorted within buckets of ``bucket`` batches: batches differ from epoch to epoch
        and still hold inputs of similar lengths.
        """
        generator = random.Random(seed)
        rows = list(range(len(self)))
        lengths = self.lengths
        batch_size = min(batch_size, len(rows))
        while True:
            generator.shuffle(rows)
            batches = []
            for start in range(0, len(rows), batch_size * bucket):
                part = sorted(
                    rows[start : start + batch_size * bucket], key=lambda row: lengths[row]
                )
                batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            batches = [part for part in batches if len(part) == batch_size]
            generator.shuffle(batches)
            for part in batches:
                yield self.batch(part)

    def _domains_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.domain_of is None else self.domain_of[list(rows)].tolist()


class TextExamples(Examples):
    """Tokenised texts; a batch is padded on the right to its longest.

    Attributes:
        ids: token numbers of each row.
        pad: the token that fills a batch.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        pad: int = 0,
        domains: Sequence[str] = (),
        domain_of: Sequence[int] | None = None,
    ):
        super().__init__(labels, domains, domain_of)
        self.ids = list(ids)
        self.pad = pad

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @staticmethod
    def positions_of(inputs: dict[str, Tensor]) -> Tensor:
        return inputs["attention_mask"].sum(1)

    def rows(self, rows: Sequence[int]) -> TextExamples:
        rows = list(rows)
        return TextExamples(
            [self.ids[row] for row in rows],
            self.labels[rows].tolist(),
            self.pad,
            self.domains,
            self._domains_of(rows),
        )

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        input_ids, attention_mask = padded([self.ids[row] for row in rows], self.pad)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def of_length(self, rows: Sequence[int], length: int) -> dict[str, Tensor]:
        """Texts are concatenated and cut."""
        texts = []
        for row in rows:
            tokens, at = list(self.ids[row]), row
            while len(tokens) < length:
                at = (at + 1) % len(self)
                tokens += self.ids[at][1:] or self.ids[at]
            texts.append(tokens[:length])
        ids = torch.tensor(texts)  # [B, L]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(texts: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], int64, with ``filler`` after each text; and int64 [B, L], 1 = a token."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), filler, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for position, text in enumerate(texts):
        ids[position, : len(text)] = torch.tensor(text, dtype=torch.long)
        mask[position, : len(text)] = 1
    return ids, mask


class PairExamples(Examples):
    """Tokenised texts and what they are to become; both end in a token of their own.

    In a batch the decoder gets the target behind ``pad``, with which generation begins, and without
    its end.

    Attributes:
        sources, targets: token numbers of each row.
        pad: the token that fills a batch.
        tokenizer: of both.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        pad: int,
        tokenizer: Any,
    ):
        super().__init__([0] * len(sources))
        self.sources, self.targets = list(sources), list(targets)
        self.pad, self.tokenizer = pad, tokenizer

    @property
    def lengths(self) -> list[int]:
        """Of both texts together."""
        return [len(s) + len(t) for s, t in zip(self.sources, self.targets, strict=True)]

    def positions_of(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["attention_mask"].sum(1) + inputs["decoder_attention_mask"].sum(1)

    def rows(self, rows: Sequence[int]) -> PairExamples:
        rows = list(rows)
        return PairExamples(
            [self.sources[row] for row in rows],
            [self.targets[row] for row in rows],
            self.pad,
            self.tokenizer,
        )

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        source, source_mask = padded([self.sources[row] for row in rows], self.pad)
        target, target_mask = padded(
            [[self.pad, *self.targets[row][:-1]] for row in rows], self.pad
        )
        return {
            "input_ids": source,
            "attention_mask": source_mask,
            "decoder_input_ids": target,
            "decoder_attention_mask": target_mask,
        }

    def labels_of(self, rows: Sequence[int]) -> Tensor:
        return padded([self.targets[row] for row in rows], IGNORED)[0]

    def texts(self) -> list[str]:
        """The targets."""
        return self.tokenizer.batch_decode(self.targets, skip_special_tokens=True)


class TensorExamples(Examples):
    """Inputs of one size: images, spectrograms.

    Attributes:
        name: the model's argument.
        values: [N, ...].
        positions: of each in the model.
    """

    def __init__(
        self,
        name: str,
        values: Tensor,
        labels: Sequence[int],
        positions: int,
        domains: Sequence[str] = (),
        domain_of: Sequence[int] | None = None,
    ):
        super().__init__(labels, domains, domain_of)
        self.name, self.values, self.positions = name, values, positions

    @property
    def lengths(self) -> list[int]:
        return [self.positions] * len(self)

    def positions_of(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.full((len(inputs[self.name]),), self.positions)

    def rows(self, rows: Sequence[int]) -> TensorExamples:
        rows = list(rows)
        labels = self.labels[rows].tolist()
        return TensorExamples(
            self.name,
            self.values[rows],
            labels,
            self.positions,
            self.domains,
            self._domains_of(rows),
        )

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {self.name: self.values[list(rows)]}


def encode(task: Task, rows: Sequence[int], tokenizer, max_length: int | None) -> TextExamples:
    """Tokenises ``rows`` of ``task``; texts beyond ``max_length`` tokens are truncated.

    Raises:
        UsageError: nothing of a text would be left.
    """
    try:
        check_length(tokenizer, max_length)
    except ValueError as error:
        raise UsageError(str(error)) from None
    texts = [task.inputs[row] for row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TextExamples(
        encoded,
        [task.labels[row] for row in rows],
        pad,
        task.domains,
        [task.domain_of[row] for row in rows] if task.domains else None,
    )
