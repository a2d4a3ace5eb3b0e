"""Batches with annotated tokens: words, separators, syntax, alignments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.explain.texts import check_length, check_tokenizer
from headwise.io.files import checked_file
from headwise.io.printable import printable, quoted

#: (dependent, head, relation): positions of words in a sentence.
Dependency = tuple[int, int, str]


@dataclass(frozen=True)
class Sentence:
    """A sentence split into words, with its dependencies.

    Attributes:
        words: the words.
        dependencies: (dependent, head, relation), words counted from 0; roots are left out.
    """

    words: tuple[str, ...]
    dependencies: tuple[Dependency, ...] = ()


@dataclass(frozen=True)
class AlignedPair:
    """Two texts split into words, and which words correspond.

    Attributes:
        first: words of the first text.
        second: words of the second.
        pairs: (word of the first, word of the second), counted from 0.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AnnotatedBatch:
    """One batch for :func:`headwise.explain.head_roles`.

    Attributes:
        inputs: what the model takes.
        valid: bool ``[B, L]``, tokens that are not padding.
        special: bool ``[B, L]``, tokens that are not part of the input (separators, a class token);
            None: there are none.
        ids: int64 ``[B, L]``, the id of each token, for same-token and rare-token roles; or None.
        words: int64 ``[B, L]``, the word that each token is part of, ascending, -1 for none;
            None: every token that is not special is a word.
        dependencies: for each sequence; words as in ``words``.
        alignment: for each sequence, pairs of tokens, one on each side; with ``target``, pairs of a
            token of this batch and one of the target.
        side: int64 ``[B, L]``: 1 or 2 for tokens of the two sides of an alignment, else 0.
        rows: int64 ``[B]``, the inputs' numbers in the data set, if batches do not keep its order.
        target: the decoder's tokens, for an encoder-decoder (``inputs`` of this batch give the
            model both); the fields above are then about the encoder's.
    """

    inputs: Any
    valid: Tensor
    special: Tensor | None = None
    ids: Tensor | None = None
    words: Tensor | None = None
    dependencies: Sequence[Sequence[Dependency]] | None = None
    alignment: Sequence[Sequence[tuple[int, int]]] | None = None
    side: Tensor | None = None
    rows: Tensor | None = None
    target: AnnotatedBatch | None = None

    def __post_init__(self) -> None:
        if self.valid.dim() != 2 or self.valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be boolean [B, L], got {self.valid.dtype} {list(self.valid.shape)}"
            )
        for name in ("special", "ids", "words", "side"):
            value = getattr(self, name)
            if value is not None and value.shape != self.valid.shape:
                raise ValueError(
                    f"{name} must have the shape of valid, {list(self.valid.shape)}, "
                    f"got {list(value.shape)}"
                )
        for name in ("dependencies", "alignment"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.valid):
                raise ValueError(
                    f"{name} must have one entry per sequence, {len(self.valid)}, got {len(value)}"
                )
        if self.target is None and (self.alignment is None) != (self.side is None):
            raise ValueError("alignment and side must be given together")
        if self.target is not None:
            self._check_target(self.target)

    def _check_target(self, target: AnnotatedBatch) -> None:
        if len(target.valid) != len(self.valid):
            raise ValueError(
                f"target must have the {len(self.valid)} sequences of valid, "
                f"got {len(target.valid)}"
            )
        if target.target is not None or target.alignment is not None or self.side is not None:
            raise ValueError(
                "target must have no target or alignment of its own, and side must not be given: "
                "alignment joins a token of the batch and one of the target"
            )

    @property
    def content(self) -> Tensor:
        """bool ``[B, L]``: neither padding nor special."""
        return self.valid if self.special is None else self.valid & ~self.special

    @property
    def word_of(self) -> Tensor:
        """int64 ``[B, L]``: the word of each token, -1 for none."""
        if self.words is not None:
            return self.words.masked_fill(~self.content, -1)
        return (self.content.long().cumsum(1) - 1).masked_fill(~self.content, -1)


#: The source of a row of a batch.
Input = str | Sentence | AlignedPair


def annotate_texts(
    texts: Sequence[Input],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int = 128,
) -> list[AnnotatedBatch]:
    """Texts, sentences split into words, and aligned pairs, as annotated batches, shortest first.

    Raises:
        ValueError: no texts, or ``max_length`` has no room for them.
    """
    if not texts:
        raise ValueError("texts must not be empty")
    aligned = any(isinstance(text, AlignedPair) for text in texts)
    check_tokenizer(tokenizer)
    check_length(tokenizer, max_length, pair=aligned)
    encoded = _encode(texts, tokenizer, max_length)
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row].ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    specials = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}))
    batches = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = max(len(encoded[row].ids) for row in rows)
        ids = torch.full((len(rows), length), pad, dtype=torch.long)  # [B, L]
        valid = torch.zeros(len(rows), length, dtype=torch.bool)  # [B, L]
        words = torch.full((len(rows), length), -1, dtype=torch.long)  # [B, L]
        side = torch.zeros(len(rows), length, dtype=torch.long)  # [B, L]
        for position, row in enumerate(rows):
            one = encoded[row]
            count = len(one.ids)
            ids[position, :count] = torch.tensor(one.ids)
            valid[position, :count] = True
            words[position, :count] = torch.tensor(one.words)
            side[position, :count] = torch.tensor(one.side)
        inputs = {"input_ids": ids, "attention_mask": valid.long()}
        if aligned and "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = (side == 2).long()
        batches.append(
            AnnotatedBatch(
                inputs=inputs,
                valid=valid,
                special=torch.isin(ids, specials),
                ids=ids,
                words=words,
                dependencies=[getattr(texts[row], "dependencies", ()) for row in rows],
                alignment=[_aligned_tokens(texts[row], encoded[row]) for row in rows]
                if aligned
                else None,
                side=side if aligned else None,
                rows=torch.tensor(rows),
            )
        )
    return batches


class _Encoded(NamedTuple):
    """One input; each list has one number per token."""

    ids: list[int]
    words: list[int]  # -1: no word; numbers of a second text continue those of the first
    side: list[int]  # 1 or 2 in a pair, else 0


def _encode(texts: Sequence[Input], tokenizer: Any, max_length: int) -> list[_Encoded]:
    """The tokenizer takes many texts of a kind at once much faster than one by one."""
    options = {"truncation": True, "max_length": max_length}
    found: dict[int, _Encoded] = {}
    for kind in (str, Sentence, AlignedPair):
        rows = [row for row, text in enumerate(texts) if isinstance(text, kind)]
        if not rows:
            continue
        own: Sequence[Any] = [texts[row] for row in rows]
        if kind is AlignedPair:
            parts: list[Any] = [
                [list(text.first) for text in own],
                [list(text.second) for text in own],
            ]
        else:
            parts = [own if kind is str else [list(text.words) for text in own]]
        encoding = tokenizer(*parts, is_split_into_words=kind is not str, **options)
        for place, row in enumerate(rows):
            words = [-1 if word is None else word for word in encoding.word_ids(place)]
            side = [0] * len(words)
            if kind is AlignedPair:
                side = [0 if n is None else n + 1 for n in encoding.sequence_ids(place)]
                before = len(own[place].first)
                words = [w + before * (s == 2) for w, s in zip(words, side, strict=True)]
            found[row] = _Encoded(encoding["input_ids"][place], words, side)
    return [found[row] for row in range(len(texts))]


def _aligned_tokens(text: Input, encoded: _Encoded) -> list[tuple[int, int]]:
    """The first tokens of words that are aligned and were not cut off."""
    if not isinstance(text, AlignedPair):
        return []
    first: dict[int, int] = {}
    for token, (word, side) in enumerate(zip(encoded.words, encoded.side, strict=True)):
        if side:
            first.setdefault(word, token)
    pairs = [(one, other + len(text.first)) for one, other in text.pairs]
    return [(first[a], first[b]) for a, b in pairs if a in first and b in first]


def read_alignments(path: str | Path, limit: int | None = None) -> list[AlignedPair]:
    """Aligned pairs of texts, one per line: ``a b c ||| x y z ||| 0-0 2-1``.

    Words are separated by spaces or tabs (a no-break space is part of a word). The alignment is in
    the format of the shared tasks on word alignment (Pharaoh): words of the first and of the second
    text, from 0.

    Raises:
        ValueError: the file is not UTF-8 or not in that format (the text names the line), or has no
            pair.
        OSError: it cannot be read.
    """
    where, lines = _lines(path)
    found: list[AlignedPair] = []
    for number, line in lines:
        if not line.strip(_BLANK):
            continue
        fields = [_words(field) for field in line.split("|||")]
        if len(fields) != 3 or not fields[0] or not fields[1]:
            raise ValueError(
                f"line {number} of {where} must have the form 'words ||| words ||| 0-0 1-1'"
            )
        pairs = []
        for pair in fields[2]:
            places = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", pair)
            if places is None:
                raise ValueError(
                    f"line {number} of {where} has the alignment {quoted(pair)}, not 0-0"
                )
            one, other = map(int, places.groups())
            if one >= len(fields[0]) or other >= len(fields[1]):
                raise ValueError(
                    f"line {number} of {where} aligns {pair}, but has {len(fields[0])} and "
                    f"{len(fields[1])} words"
                )
            pairs.append((one, other))
        found.append(AlignedPair(tuple(fields[0]), tuple(fields[1]), tuple(pairs)))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise ValueError(f"{where} has no aligned pair")
    if not any(pair.pairs for pair in found):
        raise ValueError(f"{where} aligns no words: every line ends after the second |||")
    return found


#: What separates words and makes a line blank. Other white space of Unicode (a no-break space, a
#: form feed) is part of a word.
_BLANK = " \t"


def _words(text: str) -> list[str]:
    return [word for word in re.split(f"[{_BLANK}]+", text) if word]


def _lines(path: str | Path) -> tuple[str, Iterator[tuple[int, str]]]:
    """The file's name for errors, and its lines by number, from 1.

    Lines end in LF or CRLF only: U+2028, U+0085 and form feeds, at which ``str.splitlines`` splits
    too, may be part of a word.
    """
    where = printable(str(path), 300)
    try:
        content = checked_file("path", path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from None
    lines = (line.removesuffix("\r") for line in content.split("\n"))
    return where, enumerate(lines, 1)


def read_conllu(path: str | Path, limit: int | None = None) -> list[Sentence]:
    """The sentences of a CoNLL-U file (universaldependencies.org/format.html).

    Multi-word tokens and empty nodes are left out: dependencies are between words.

    Raises:
        ValueError: the file is not UTF-8 or not CoNLL-U (by line), or has no sentence.
        OSError: it cannot be read.
    """
    where, lines = _lines(path)
    sentences: list[Sentence] = []
    rows: list[tuple[str, int, str]] = []  # (form, head, relation)

    def finish() -> None:
        if rows:
            links = [(i, head - 1, kind) for i, (_, head, kind) in enumerate(rows) if head > 0]
            for dependent, head, _ in links:
                if head >= len(rows) or head == dependent:
                    raise ValueError(
                        f"{where}: word {dependent + 1} of sentence {len(sentences) + 1} has head "
                        f"{head + 1}, which is "
                        + ("itself" if head == dependent else f"none of its {len(rows)} words")
                    )
            sentences.append(Sentence(tuple(form for form, _, _ in rows), tuple(links)))
            rows.clear()

    for number, line in lines:
        if not line.strip(_BLANK):
            finish()
        elif not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != 10:
                raise ValueError(
                    f"line {number} of {where} is not CoNLL-U: it has {len(fields)} columns, not 10"
                )
            if re.fullmatch(r"[0-9]{1,9}[-.][0-9]{1,9}", fields[0]):  # 3-4 or 5.1
                continue
            if fields[0] != str(len(rows) + 1):
                raise ValueError(
                    f"line {number} of {where} is not CoNLL-U: its ID must be {len(rows) + 1}, "
                    f"got {quoted(fields[0])}"
                )
            if re.fullmatch("[0-9]{1,9}", fields[6]) is None:
                raise ValueError(
                    f"line {number} of {where} is not CoNLL-U: its HEAD must be a number, "
                    f"got {quoted(fields[6])}"
                )
            rows.append((fields[1], int(fields[6]), fields[7]))
        if limit is not None and len(sentences) >= limit:
            return sentences
    finish()
    if not sentences:
        raise ValueError(f"{where} has no sentence")
    return sentences


def parse_with_spacy(texts: Sequence[str], model: str) -> list[Sentence]:
    """Texts parsed by a pipeline of spaCy (its sentences; relations in its own labels).

    Raises:
        ValueError: spaCy or the pipeline is not installed.
    """
    try:
        import spacy

        pipeline = spacy.load(model)
    except (ImportError, OSError):
        raise ValueError(
            f"spaCy and its pipeline {quoted(model)} must be installed to parse"
        ) from None
    sentences = []
    for document in pipeline.pipe(texts):
        for part in document.sents:
            words = [token for token in part if not token.is_space]
            place = {token.i: position for position, token in enumerate(words)}
            links = [
                (place[token.i], place[token.head.i], token.dep_)
                for token in words
                if token.head.i != token.i and token.head.i in place
            ]
            if len(words) > 1:
                sentences.append(Sentence(tuple(token.text for token in words), tuple(links)))
    return sentences
