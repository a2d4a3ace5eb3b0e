"""Classification tasks, their splits, and user files."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import OwnModel
from headwise.io.printable import printable, quoted

#: Share of the rows for validation and for the test; the rest is for training.
VALIDATION_SHARE = 0.12
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Task:
    """Inputs with one label each.

    Attributes:
        name: short, without spaces; used in ``results.json``.
        title: for display.
        inputs: one per row: strings; of images and sounds, what the model takes, [N, ...].
        labels: class number of each row, an index into ``classes``.
        groups: rows of one group (a document, a film) are never on two sides of a split.
        classes: names of the classes; empty if the answers are texts.
        targets: the right text for each row, if the answers are texts (all labels are then 0).
        domains: names of the tasks, if several are combined; else empty.
        domain_of: number of each row's domain, an index into ``domains``.
        example: what an input is called.
        model: what learns the task, if it is not a pretrained text encoder.
    """

    name: str
    title: str
    inputs: Any
    labels: tuple[int, ...]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    targets: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    domain_of: tuple[int, ...] = ()
    example: str = "text"
    model: OwnModel | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def with_labels_of(self, label2id: dict[str, int], read_as: str | None = None) -> Task:
        """The same task in a trained model's class numbers.

        Args:
            label2id: names of the model's classes -> their numbers.
            read_as: how to read the task's labels, see :func:`class_numbers`.

        Raises:
            UsageError: a label that the model does not know, or labels that may mean two things.
        """
        numbers = class_numbers(self.classes, label2id, read_as)
        return replace(self, labels=tuple(numbers[self.classes[label]] for label in self.labels))


def class_numbers(
    labels: Iterable[str], label2id: dict[str, int], read_as: str | None = None
) -> dict[str, int]:
    """Label -> class number of a trained model, for every one of ``labels``.

    Labels are either all names of classes or all numbers of classes, never a mixture. Where they
    could be both and would then mean different classes (labels 1 and 2 for classes named "1", "2"
    and "3", whose numbers are 0, 1 and 2), they are not guessed.

    Args:
        labels: from the data.
        label2id: names of the model's classes -> their numbers.
        read_as: "names" or "numbers"; None: whichever of the two fits.

    Raises:
        UsageError: a label that the model does not know, or labels that may mean two things.
    """
    labels = list(dict.fromkeys(labels))
    readings = {
        "names": {str(name): number for name, number in label2id.items()},
        "numbers": {str(number): number for number in label2id.values()},
    }
    if read_as is not None:
        readings = {read_as: readings[read_as]}
    fitting = [known for known in readings.values() if all(label in known for label in labels)]
    if not fitting:
        what = "classes" if read_as in (None, "names") else "class numbers"
        known = next(iter(readings.values()))
        # The label that the better reading lacks: a single wrong one, if the others fit.
        lacks = ([label for label in labels if label not in own] for own in readings.values())
        raise UsageError(
            f"label {quoted(min(lacks, key=len)[0])} is none of the model's {what}: "
            + ", ".join(quoted(label) for label in list(known)[:12])
            + (", ..." if len(known) > 12 else "")
        )
    for label in labels:
        if len({known[label] for known in fitting}) > 1:
            raise UsageError(
                f"label {quoted(label)} is the name of class {fitting[0][label]} of the model and "
                f"also the number of another class: say --labels-are names or --labels-are numbers"
            )
    return {label: fitting[0][label] for label in labels}


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
    """Builds a task from (text, label, group) rows, or raises an error."""
    rows = [(text, label, group) for text, label, group in rows if text.strip()]
    if not rows:
        raise UsageError(f"{source} has no rows with text")
    found = Counter(label for _, label, _ in rows)
    if len(found) < 2 and least > 1:
        raise UsageError(
            f"{source} must have at least two different labels, got one "
            f"({quoted(next(iter(found)))})"
        )
    rarest, seen = min(found.items(), key=lambda item: item[1])
    if seen < least:
        hint = ""
        if len(found) > 50:
            hint = f"; with {len(found)} different values it does not look like a class label"
        raise UsageError(
            f"every label of {source} needs at least {least} rows, but {quoted(rarest)} has "
            f"{seen}{hint}"
        )
    classes = tuple(classes or sorted(found))
    number = {label: position for position, label in enumerate(classes)}
    return Task(
        name=name,
        title=title,
        inputs=tuple(text for text, _, _ in rows),
        labels=tuple(number[label] for _, label, _ in rows),
        groups=tuple(group for _, _, group in rows),
        classes=classes,
    )


@dataclass(frozen=True)
class Row:
    """A row of a data file.

    Attributes:
        line: the line of the file that it begins in, from 1.
        cells: column -> value: text in CSV, what JSON has in JSON lines.
    """

    line: int
    cells: dict[str, Any]


def read_text(row: Row, column: str, path: Path) -> str:
    """The text in a column of a row.

    Raises:
        UsageError: there is none, or it is no text that UTF-8 can hold.
    """
    value = _cell(row, column, path)
    if not isinstance(value, str):
        raise UsageError(
            f"line {row.line} of {printable(path.name)} must have a text for {quoted(column)}, "
            f"got {quoted(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"line {row.line} of {printable(path.name)} must have a text that UTF-8 can hold for "
            f"{quoted(column)}, got half a surrogate pair at character {error.start}"
        ) from None
    return value


def read_label(row: Row, column: str, path: Path) -> str:
    """The label, or name of a document, in a column of a row, without the spaces around it.

    Raises:
        UsageError: there is none, or a value that is no name (a list, an object).
    """
    value = _cell(row, column, path)
    if isinstance(value, list | dict):
        raise UsageError(
            f"line {row.line} of {printable(path.name)} must have one value for {quoted(column)}, "
            f"got {quoted(value)}"
        )
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    if not name:
        raise _no_value(row, column, path)
    return name


def _cell(row: Row, column: str, path: Path) -> Any:
    value = row.cells.get(column)
    if value is None:
        raise _no_value(row, column, path)
    return value


def _no_value(row: Row, column: str, path: Path) -> UsageError:
    return UsageError(
        f"line {row.line} of {printable(path.name)} has no value for {quoted(column)}"
    )


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a ``.csv`` file with a header, or of a ``.jsonl`` file with one object per line.

    Files are read strictly: what could be meant in two ways is refused.

    Args:
        path: the file, UTF-8.
        columns: names that the first row must have.

    Raises:
        UsageError: no such file, or it is empty, has no rows, lacks a column, is not UTF-8, or is
            not what its name says (by line).
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"data must be a .csv or .jsonl file, got {quoted(path.name)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        # utf-8-sig: spreadsheets begin their CSV files with a byte order mark.
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not content.strip():
        raise UsageError(f"{path} is empty")
    rows = (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(content, path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    for column in columns:
        if column not in rows[0].cells:
            names = ", ".join(quoted(name) for name in list(rows[0].cells)[:20])
            raise UsageError(f"{path} has no column {quoted(column)}; it has {names}")
    return rows


def _csv_rows(content: str, path: Path) -> list[Row]:
    # Texts may be longer than csv's default limit of 128 KiB a field.
    csv.field_size_limit(1 << 27)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = str(error)
            if "unexpected end" in what:
                what = "a quote that is opened there is never closed"
            raise UsageError(f"line {line} of {path} is not CSV: {what}") from None
        if cells is None:
            return rows
        if not cells:  # an empty line
            continue
        if header is None:
            header = cells
            _check_unique(header, line, path)
            continue
        if len(cells) != len(header):
            raise UsageError(
                f"line {line} of {path} has {len(cells)} cells, but the header has {len(header)}"
            )
        rows.append(Row(line, dict(zip(header, cells, strict=True))))


def _json_rows(content: str, path: Path) -> list[Row]:
    rows = []
    # Not splitlines: a string in JSON may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue

        def unique(pairs: list[tuple[str, Any]], number: int = number) -> dict[str, Any]:
            _check_unique([name for name, _ in pairs], number, path)
            return dict(pairs)

        def constant(name: str, number: int = number) -> None:
            raise UsageError(f"line {number} of {path} has {name}, which JSON does not have")

        try:
            row = json.loads(line, object_pairs_hook=unique, parse_constant=constant)
        except UsageError:
            raise
        except json.JSONDecodeError as error:
            raise UsageError(f"line {number} of {path} is not JSON: {error.msg}") from None
        except (ValueError, RecursionError):  # a number of thousands of digits; brackets likewise
            raise UsageError(
                f"line {number} of {path} is nested too deeply or has too long a number"
            ) from None
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of {path} must be a JSON object, got {quoted(row)}")
        rows.append(Row(number, row))
    return rows


def _check_unique(names: Sequence[str], line: int, path: Path) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 1)
    if times > 1:
        raise UsageError(f"line {line} of {path} has the column {quoted(name)} {times} times")


def task_from_file(
    path: str | Path,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    *,
    least: int = 10,
) -> Task:
    """A task from a ``.csv`` file with a header, or a ``.jsonl`` file with one object per line.

    Args:
        path: the file, UTF-8.
        text: column of the texts.
        label: column of the labels.
        group: column of the document that a row belongs to; rows of one document stay on one side
            of the split. Default: rows with equal texts stay together.
        least: rows that every label needs; with 1, one label is enough.

    Rows without text are left out. Spaces around a label do not belong to it.

    Raises:
        UsageError: what :func:`read_rows` refuses, one label only, or a label with too few rows.
    """
    path = Path(path)
    triples = []
    for row in read_rows(path, [text, label, *([group] if group else [])]):
        content = read_text(row, text, path)
        owner = read_label(row, group, path) if group else content
        if content.strip():
            triples.append((content, read_label(row, label, path), owner))
    name = printable(path.name)
    return build_task(printable(path.stem), name, triples, name, least=least)


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
                f"{quoted(task.classes[min(missing)])}: the data is too small or its documents too "
                "large"
            )
    return Split(*(tuple(rows) for rows in parts))
