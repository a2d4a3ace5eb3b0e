"""Yes/no probes that determine a head's role: how often is a query's strongest key the one that the
role predicts?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwise.explain.annotated import AnnotatedBatch

#: Words that the fixed-offset baseline may look away, to either side.
BASELINE_REACH = 10


@dataclass(frozen=True)
class Question:
    """A possible role of a head.

    Attributes:
        role: "offset", "first", "separator", "same token", "rare token", "syntactic",
            "alignment" or "grid offset".
        detail: the variant: "-1", "nsubj: dependent to head", "2 to 1"; may be empty.
    """

    role: str
    detail: str = ""


@dataclass
class Trials:
    """The trials of one batch with the same grouping of keys and the same target.

    Attributes:
        looks: "all" keys, "content" (special tokens excluded), or "1" or "2": only the keys of that
            side of an alignment.
        group: int64 ``[B, L]``: keys of one group are equivalent.
        others_only: looking at itself is not a hit.
        rows: (sequence, question, query, key) tuples.
    """

    looks: str
    group: Tensor
    others_only: bool = False
    rows: list[Tensor] = field(default_factory=list)  # int64 [n, 4]

    def add(self, question: int, where: Tensor, key: Tensor) -> None:
        """``where`` int64 ``[n, 2]`` (sequence, query), ``key`` int64 ``[n]``."""
        if len(where):
            filled = torch.full((len(where), 1), question, dtype=torch.long)
            self.rows.append(torch.cat([where[:, :1], filled, where[:, 1:], key[:, None]], 1))

    def tensor(self) -> Tensor:
        return torch.cat(self.rows) if self.rows else torch.zeros(0, 4, dtype=torch.long)


class Questionnaire:
    """All the questions for a data set, and their trials in each batch.

    Args:
        batches: the data set; relations are taken from it.
        offsets: token offsets to ask about, up to this far to either side, and 0.
        grid: (rows, columns) of an image whose content tokens are its patches in reading order:
            asks about 2-D offsets of up to one patch, too.
        frequency: how often each token id occurs; default: in ``batches``.
        least_trials: relations with fewer trials are not asked about.
    """

    def __init__(
        self,
        batches: Sequence[AnnotatedBatch],
        *,
        offsets: int = 2,
        grid: tuple[int, int] | None = None,
        frequency: Tensor | None = None,
        least_trials: int = 20,
    ):
        self.grid = grid
        self.questions: list[Question] = []
        self._offsets = [o for o in range(-offsets, offsets + 1)]
        for offset in self._offsets:
            self._ask("offset", f"{offset:+d}" if offset else "0")
        self._ask("first")
        if any(batch.special is not None for batch in batches):
            self._ask("separator")
        self._has_ids = all(batch.ids is not None for batch in batches)
        if self._has_ids:
            self._ask("same token")
            self._ask("rare token")
            self._frequency = _count(batches) if frequency is None else frequency
        if grid is not None:
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    self._ask("grid offset", f"{dy:+d},{dx:+d}")
        seen = Counter(
            relation
            for batch in batches
            for sentence in batch.dependencies or ()
            for _, _, relation in sentence
        )
        for relation in sorted(r for r, count in seen.items() if count >= least_trials):
            self._ask("syntactic", f"{relation}: dependent to head")
            self._ask("syntactic", f"{relation}: head to dependent")
        if any(batch.alignment is not None and batch.target is None for batch in batches):
            self._ask("alignment", "1 to 2")
            self._ask("alignment", "2 to 1")
        self._number = {question: i for i, question in enumerate(self.questions)}

    def _ask(self, role: str, detail: str = "") -> None:
        self.questions.append(Question(role, detail))

    def _of(self, role: str, detail: str = "") -> int:
        return self._number[Question(role, detail)]

    def trials(self, batch: AnnotatedBatch) -> list[Trials]:
        """The trials of ``batch``."""
        position = torch.arange(batch.valid.size(1)).expand_as(batch.valid)  # [B, L]
        return [
            trials
            for trials in (
                self._positions(batch, position),
                self._first(batch, position),
                self._separators(batch),
                self._same(batch),
                self._rare(batch),
                self._words(batch),
                *self._alignment(batch, position),
            )
            if trials is not None
        ]

    def _positions(self, batch: AnnotatedBatch, position: Tensor) -> Trials:
        trials = Trials("content", position)
        content = batch.content
        length = content.size(1)
        for offset in self._offsets:
            number = self._of("offset", f"{offset:+d}" if offset else "0")
            _shifted(trials, number, content, offset, length)
        if self.grid is not None:
            self._grid(trials, content, *self.grid)
        return trials

    def _grid(self, trials: Trials, content: Tensor, rows: int, columns: int) -> None:
        for b, row in enumerate(content):
            patches = row.nonzero().flatten()  # [rows * columns]
            if len(patches) != rows * columns:
                raise ValueError(
                    f"grid must have one place per content token ({len(patches)}), "
                    f"got {rows} x {columns}"
                )
            y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    inside = (0 <= y + dy) & (y + dy < rows) & (0 <= x + dx) & (x + dx < columns)
                    target = ((y + dy) * columns + x + dx)[inside]
                    where = torch.stack([torch.full_like(target, b), patches[inside]], 1)
                    number = self._of("grid offset", f"{dy:+d},{dx:+d}")
                    trials.add(number, where, patches[target])

    def _first(self, batch: AnnotatedBatch, position: Tensor) -> Trials:
        trials = Trials("all", position)
        first = batch.valid.long().argmax(1)  # [B]
        asking = batch.content & (position != first[:, None])
        where = asking.nonzero()  # [n, 2]
        trials.add(self._of("first"), where, first[where[:, 0]])
        return trials

    def _separators(self, batch: AnnotatedBatch) -> Trials | None:
        if batch.special is None:
            return None
        first = batch.valid.long().argmax(1)  # [B]
        separator = batch.special & batch.valid
        separator[torch.arange(len(first)), first] = False
        trials = Trials("all", separator.long())
        where = (batch.content & separator.any(1, keepdim=True)).nonzero()
        trials.add(self._of("separator"), where, separator.long().argmax(1)[where[:, 0]])
        return trials

    def _same(self, batch: AnnotatedBatch) -> Trials | None:
        if batch.ids is None or not self._has_ids:
            return None
        # Ids that only special tokens or padding have belong to no group.
        group = batch.ids.masked_fill(~batch.content, -1)
        trials = Trials("content", group, others_only=True)
        for b, row in enumerate(group):
            kinds, inverse, counts = row.unique(return_inverse=True, return_counts=True)
            again = ((counts[inverse] > 1) & (row >= 0)).nonzero().flatten()
            where = torch.stack([torch.full_like(again, b), again], 1)
            trials.add(self._of("same token"), where, again)
        return trials

    def _rare(self, batch: AnnotatedBatch) -> Trials | None:
        if batch.ids is None or not self._has_ids:
            return None
        known = batch.ids.clamp(0, len(self._frequency) - 1)
        count = self._frequency[known].double().masked_fill(~batch.content, float("inf"))
        least = count.amin(1, keepdim=True)  # [B, 1]
        rarest = (count == least) & batch.content
        # If every token is equally rare, there is no rarest.
        telling = batch.content.sum(1, keepdim=True) > rarest.sum(1, keepdim=True)
        where = (batch.content & telling).nonzero()
        trials = Trials("content", rarest.long())
        trials.add(self._of("rare token"), where, rarest.long().argmax(1)[where[:, 0]])
        return trials

    def _words(self, batch: AnnotatedBatch) -> Trials | None:
        if batch.dependencies is None:
            return None
        word_of = batch.word_of
        trials = Trials("content", word_of)
        for b, links in enumerate(batch.dependencies):
            first = first_tokens(word_of[b])
            for dependent, head, relation in links:
                if dependent not in first or head not in first:  # cut off
                    continue
                for detail, query, key in (
                    (f"{relation}: dependent to head", dependent, head),
                    (f"{relation}: head to dependent", head, dependent),
                ):
                    number = self._number.get(Question("syntactic", detail))
                    if number is not None:
                        trials.rows.append(torch.tensor([[b, number, first[query], first[key]]]))
        return trials

    def _alignment(self, batch: AnnotatedBatch, position: Tensor) -> list[Trials]:
        if batch.alignment is None or batch.target is not None or batch.side is None:
            return []
        found = []
        for side, other in ((1, 2), (2, 1)):
            trials = Trials(str(other), position)
            number = self._of("alignment", f"{side} to {other}")
            for b, pairs in enumerate(batch.alignment):
                for pair in pairs:
                    sides = [int(batch.side[b, token]) for token in pair]
                    if sorted(sides) != [1, 2]:
                        raise ValueError(
                            f"alignment must join tokens of the two sides, got {pair} of sides "
                            f"{sides} in sequence {b}"
                        )
                    query, key = pair if sides[0] == side else pair[::-1]
                    trials.rows.append(torch.tensor([[b, number, query, key]]))
            found.append(trials)
        return found


class CrossQuestions:
    """The question for cross-attention: does a token of the target look at the one it is aligned
    with?"""

    grid = None

    def __init__(self, batches: Sequence[AnnotatedBatch]):
        asked = any(batch.alignment is not None for batch in batches)
        self.questions = [Question("alignment", "target to source")] if asked else []

    def trials(self, batch: AnnotatedBatch) -> list[Trials]:
        """The trials of ``batch``."""
        if batch.alignment is None or batch.target is None:
            return []
        position = torch.arange(batch.valid.size(1)).expand_as(batch.valid)  # [B, S]
        trials = Trials("content", position)
        for b, pairs in enumerate(batch.alignment):
            for source, target in pairs:
                if not (batch.content[b, source] and batch.target.content[b, target]):
                    raise ValueError(
                        "alignment must join tokens that are neither padding nor special, got "
                        f"{(source, target)} in sequence {b}"
                    )
                trials.rows.append(torch.tensor([[b, 0, target, source]]))
        return [trials]


def excluded_keys(batch: AnnotatedBatch, looks: str) -> Tensor | None:
    """bool ``[B, L]``: keys to ignore, with ``looks`` as in :class:`Trials`."""
    if looks == "all":
        return None
    if looks == "content":
        return ~batch.content
    assert batch.side is not None  # questions about alignment have sides
    return batch.side != int(looks)


def fixed_offset_peaks(queries: AnnotatedBatch, keys: AnnotatedBatch | None = None) -> Tensor:
    """The keys of heads that always look a fixed number of words away: int32 ``[B, 2 R, L]``, -1 if
    there is no word. ``keys``: the sequence they look at; default: the queries' own."""
    word_of = queries.word_of
    words = word_of if keys is None else keys.word_of
    offsets = torch.tensor([o for o in range(-BASELINE_REACH, BASELINE_REACH + 1) if o])
    peaks = torch.full((len(word_of), len(offsets), word_of.size(1)), -1, dtype=torch.int32)
    for b, row in enumerate(word_of):
        first = first_tokens(words[b])
        table = torch.full((max(first, default=-1) + 2 + 2 * BASELINE_REACH,), -1)
        for word, token in first.items():
            table[word + BASELINE_REACH] = token
        at = row + offsets[:, None] + BASELINE_REACH  # [2 R, L]
        peaks[b] = table[at.clamp(0, len(table) - 1)].masked_fill(row < 0, -1).int()
    return peaks


def first_tokens(word_of: Tensor) -> dict[int, int]:
    """Word -> its first token. word_of int64 ``[L]``."""
    first: dict[int, int] = {}
    for token, word in enumerate(word_of.tolist()):
        if word >= 0:
            first.setdefault(word, token)
    return first


def _shifted(trials: Trials, number: int, content: Tensor, offset: int, length: int) -> None:
    where = content.nonzero()  # [n, 2]
    target = where[:, 1] + offset
    inside = (target >= 0) & (target < length)
    where, target = where[inside], target[inside]
    usable = content[where[:, 0], target]
    trials.add(number, where[usable], target[usable])


def _count(batches: Sequence[AnnotatedBatch]) -> Tensor:
    ids = torch.cat([batch.ids[batch.content] for batch in batches if batch.ids is not None])
    return torch.bincount(ids, minlength=1)  # texts may have nothing but special tokens
