"""Tokenised texts, and the batches made of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 = token.
        labels: int64 [B].
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.rows,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
        )


class Examples:
    """Token numbers and labels of some rows of a task.

    Attributes:
        ids: token numbers of each row.
        labels: int64 [N].
        pad: the token that fills a batch.
        domains: names of the task's domains; empty if it has one.
        domain_of: int64 [N], each row's, or None.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        pad: int = 0,
        domains: Sequence[str] = (),
        domain_of: Sequence[int] | None = None,
    ):
        self.ids = list(ids)
        self.labels = torch.tensor(list(labels), dtype=torch.long)
        self.pad = pad
        self.domains = tuple(domains)
        self.domain_of = torch.tensor(list(domain_of or ()), dtype=torch.long) if domains else None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, limit: int | None) -> Examples:
        """The first ``limit`` examples; all if it is None."""
        if limit is None or limit >= len(self):
            return self
        return self.rows(range(limit))

    def rows(self, rows: Sequence[int]) -> Examples:
        """The examples at the given positions."""
        rows = list(rows)
        return Examples(
            [self.ids[row] for row in rows],
            self.labels[rows].tolist(),
            self.pad,
            self.domains,
            None if self.domain_of is None else self.domain_of[rows].tolist(),
        )

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows, padded on the right to the longest."""
        length = max(len(self.ids[row]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad, dtype=torch.long)  # [B, L]
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)  # [B, L]
        for position, row in enumerate(rows):
            tokens = torch.tensor(self.ids[row], dtype=torch.long)
            input_ids[position, : len(tokens)] = tokens
            attention_mask[position, : len(tokens)] = 1
        index = torch.tensor(list(rows), dtype=torch.long)
        return Batch(index, input_ids, attention_mask, self.labels[index])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, shortest first, so that padding is rare."""
        rows = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(rows), batch_size):
            yield self.batch(rows[start : start + batch_size])

    def shuffled(self, batch_size: int, seed: int, bucket: int = 16) -> Iterator[Batch]:
        """Endless full batches, each epoch in a new order.

        Lengths are sorted within buckets of ``bucket`` batches: batches differ from epoch to epoch
        and still hold texts of similar lengths.
        """
        generator = random.Random(seed)
        rows = list(range(len(self)))
        batch_size = min(batch_size, len(rows))
        while True:
            generator.shuffle(rows)
            batches = []
            for start in range(0, len(rows), batch_size * bucket):
                part = sorted(
                    rows[start : start + batch_size * bucket], key=lambda row: len(self.ids[row])
                )
                batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            batches = [part for part in batches if len(part) == batch_size]
            generator.shuffle(batches)
            for part in batches:
                yield self.batch(part)


def encode(task: Task, rows: Sequence[int], tokenizer, max_length: int | None) -> Examples:
    """Tokenises ``rows`` of ``task``; texts beyond ``max_length`` tokens are truncated.

    Raises:
        UsageError: nothing of a text would be left.
    """
    try:
        check_length(tokenizer, max_length)
    except ValueError as error:
        raise UsageError(str(error)) from None
    encoded = tokenizer([task.texts[row] for row in rows], truncation=True, max_length=max_length)[
        "input_ids"
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Examples(
        encoded,
        [task.labels[row] for row in rows],
        pad,
        task.domains,
        [task.domain_of[row] for row in rows] if task.domains else None,
    )
