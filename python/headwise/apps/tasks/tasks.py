"""Text classification tasks, how they are split, and one's own files."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headwise.apps.tasks.errors import UsageError

#: Share of the rows for validation and for the test; the rest is for training.
VALIDATION_SHARE = 0.12
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Task:
    """Texts with a label each.

    Attributes:
        name: short, without spaces; stands in ``results.json``.
        title: for people.
        texts: one string a row.
        labels: class number of each row, an index into ``classes``.
        groups: rows of one group (a document, a film) never stand on two sides of a split.
        classes: names of the classes.
        domains: where several tasks stand in one, their names; else empty.
        domain_of: number of each row's domain, an index into ``domains``.
    """

    name: str
    title: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    domains: tuple[str, ...] = ()
    domain_of: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def with_labels_of(self, label2id: dict[str, int]) -> Task:
        """The same task in a trained model's class numbers, where the names (or numbers) agree.

        Raises:
            UsageError: a label that the model does not know.
        """
        numbers = {str(number): number for number in label2id.values()}
        known = {**numbers, **label2id}
        for name in self.classes:
            if name not in known:
                raise UsageError(
                    f"label {name!r} is none of the model's classes: "
                    + ", ".join(repr(str(label)) for label in label2id)
                )
        return replace(self, labels=tuple(known[self.classes[label]] for label in self.labels))


@dataclass(frozen=True)
class Split:
    """Row numbers of a task, each row in exactly one list."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def build_task(
    name: str,
    title: str,
    rows: Iterable[tuple[str, str, str]],
    source: str,
    classes: Sequence[str] | None = None,
    least: int = 10,
) -> Task:
    """Builds a task from (text, label, group) rows, or says what is wrong with them."""
    rows = [(text, label, group) for text, label, group in rows if text.strip()]
    if not rows:
        raise UsageError(f"{source} has no rows with text")
    found = Counter(label for _, label, _ in rows)
    if len(found) < 2 and least > 1:
        raise UsageError(
            f"{source} must have at least two different labels, got one ({next(iter(found))!r})"
        )
    rarest, seen = min(found.items(), key=lambda item: item[1])
    if seen < least:
        hint = ""
        if len(found) > 50:
            hint = f"; with {len(found)} different values it does not look like a class label"
        raise UsageError(
            f"every label of {source} needs at least {least} rows, but {rarest!r} has {seen}{hint}"
        )
    classes = tuple(classes or sorted(found))
    number = {label: position for position, label in enumerate(classes)}
    return Task(
        name=name,
        title=title,
        texts=tuple(text for text, _, _ in rows),
        labels=tuple(number[label] for _, label, _ in rows),
        groups=tuple(group for _, _, group in rows),
        classes=classes,
    )


def read_cell(row: dict, column: str, path: Path, number: int) -> str:
    """The value of a column of the row with that number; what is no text as JSON.

    Raises:
        UsageError: there is none.
    """
    value = row.get(column)
    if value is None:
        raise UsageError(f"row {number} of {path.name} has no value for {column!r}")
    return value if isinstance(value, str) else json.dumps(value)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .csv or .jsonl file.

    Raises:
        UsageError: it is empty, not UTF-8, or not what its name says (by line).
    """
    try:
        # utf-8-sig: spreadsheets begin their CSV files with a byte order mark.
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not content.strip():
        raise UsageError(f"{path} is empty")
    if path.suffix.lower() == ".csv":
        try:
            # Texts may be longer than csv's default limit of 128 KiB a field.
            csv.field_size_limit(1 << 27)
            return list(csv.DictReader(io.StringIO(content, newline="")))
        except csv.Error as error:
            raise UsageError(f"{path} is not a CSV file: {error}") from None
    rows = []
    # Not splitlines: a string in JSON may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"line {number} of {path} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UsageError(
                    f"line {number} of {path} must be a JSON object, got {line[:40]!r}"
                )
            rows.append(row)
    return rows


def task_from_file(
    path: str | Path,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    *,
    least: int = 10,
) -> Task:
    """A task from a ``.csv`` file with a header, or a ``.jsonl`` file with an object a line.

    Args:
        path: the file, UTF-8.
        text: column of the texts.
        label: column of the labels.
        group: column of the document that a row belongs to; rows of one document stay on one side
            of the split. Default: rows with equal texts stay together.
        least: rows that every label needs; with 1, one label is enough.

    Rows without text are left out. Spaces around a label do not belong to it.

    Raises:
        UsageError: no such file or column, no rows, one label only, or a label with too few rows.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"data must be a .csv or .jsonl file, got {path.name!r}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    rows = read_rows(path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    columns = list(rows[0])
    for column in (text, label, *([group] if group else [])):
        if column not in columns:
            raise UsageError(
                f"{path} has no column {column!r}; it has "
                + ", ".join(repr(str(name)) for name in columns)
            )
    triples = []
    for number, row in enumerate(rows, 1):
        content = read_cell(row, text, path, number)
        owner = read_cell(row, group, path, number) if group else content
        if content.strip():
            name = read_cell(row, label, path, number).strip()
            if not name:
                raise UsageError(f"row {number} of {path.name} has no value for {label!r}")
            triples.append((content, name, owner))
    return build_task(path.stem, path.name, triples, path.name, least=least)


def split(
    task: Task,
    seed: int,
    validation_share: float = VALIDATION_SHARE,
    test_share: float = TEST_SHARE,
) -> Split:
    """Splits a task once, whole groups at a time, by a seed.

    Raises:
        UsageError: a part lacks a class: the task is too small, or has too few groups.
    """
    sizes = Counter(task.groups)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    part_of: dict[str, int] = {}
    taken = 0
    for group in order:
        share = taken / len(task)
        part_of[group] = (
            2 if share < test_share else 1 if share < test_share + validation_share else 0
        )
        taken += sizes[group]
    parts: tuple[list[int], ...] = ([], [], [])
    for row, group in enumerate(task.groups):
        parts[part_of[group]].append(row)
    for part, rows in zip(("training", "validation", "test"), parts, strict=True):
        missing = set(range(len(task.classes))) - {task.labels[row] for row in rows}
        if missing:
            raise UsageError(
                f"the {part} part of {task.name} ({len(rows)} rows) has no row labelled "
                f"{task.classes[min(missing)]!r}: the data is too small or its documents too large"
            )
    return Split(*(tuple(rows) for rows in parts))
