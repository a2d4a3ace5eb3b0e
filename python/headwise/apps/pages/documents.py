"""The JSON documents that a page is made of."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from headwise.io.files import read_text
from headwise.io.printable import quoted

#: Format of each document, and the field of :class:`Documents` that it fills.
FORMATS = {
    "headwise.explanation": "explanation",
    "headwise.use": "use",
    "headwise.roles": "roles",
    "headwise compare": "compared",  # results.json, which names no format
}


@dataclass(frozen=True)
class Documents:
    """The content of a page; None if not given.

    Attributes:
        explanation: one or more inputs (``hw.explain``).
        use: a data set (``hw.explain_data``).
        roles: of heads (``hw.head_roles``); those of ``use`` if given.
        compared: ``results.json`` of ``headwise compare``.
    """

    explanation: dict[str, Any] | None = None
    use: dict[str, Any] | None = None
    roles: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None


def sort_documents(given: tuple[Any, ...]) -> Documents:
    """Sorts documents by format.

    Args:
        given: mappings, objects with ``to_dict()``, or paths of JSON files.

    Raises:
        ValueError: none, two of a kind, or one of an unknown format or version.
        TypeError: something that is not a document.
        OSError: a file cannot be read.
    """
    found: dict[str, Any] = {}
    for one in given:
        document = _load(one)
        is_compared = {"comparisons", "summary", "tasks"} <= document.keys()
        name = "headwise compare" if is_compared else document.get("format")
        if name not in FORMATS:
            raise ValueError(
                f"documents must be of format {', '.join(map(repr, FORMATS))}, got {quoted(name)}"
            )
        if not is_compared and document.get("version") != 1:
            raise ValueError(
                f"a document of format {quoted(name)} must have version 1, "
                f"got {quoted(document.get('version'))}"
            )
        if is_compared and any("latency" not in entry for entry in document["summary"]):
            raise ValueError(
                "results.json of 'headwise compare' must have the latency of every entry of its "
                "summary: this version's does"
            )
        if FORMATS[name] in found:
            raise ValueError(f"documents must be one of each format, got two of {quoted(name)}")
        found[FORMATS[name]] = document
    if not found:
        raise ValueError("documents must be at least one, got none")
    if "use" in found:
        found["roles"] = found["use"]["roles"]
    if not any(found.get(field.name) for field in fields(Documents)):
        raise ValueError("documents must not be empty")
    return Documents(**found)


@contextlib.contextmanager
def complete_documents() -> Iterator[None]:
    """A key that a page needs and a document lacks is one sentence: files of other versions differ.

    Raises:
        ValueError: a key is missing.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"documents must be of this version of headwise: one lacks {quoted(error.args[0])}; "
            "run the command that wrote it again"
        ) from error


def _load(one: Any) -> dict[str, Any]:
    if isinstance(one, str | os.PathLike):
        text = read_text(one)
        try:
            one = json.loads(text)
        except ValueError:
            raise ValueError(f"{os.fspath(one)} is not a JSON document") from None
    elif hasattr(one, "to_dict"):
        one = one.to_dict()
    if not isinstance(one, Mapping):
        raise TypeError(f"documents must be mappings or paths of JSON, got {type(one).__name__}")
    return dict(one)
