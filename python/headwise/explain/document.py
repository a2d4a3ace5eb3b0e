"""An explanation as a document: JSON that a page, a notebook or another program reads."""

from __future__ import annotations

import json
import os
from typing import Any

from headwise.explain.summary import summarise
from headwise.io.files import write_atomic


class Explanation:
    """What :func:`headwise.explain` found about each input of a batch.

    Attributes:
        document: the content, of format ``headwise.explanation`` (docs/interpretability.md).
    """

    def __init__(self, document: dict[str, Any]):
        self.document = document

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """An explanation for each input."""
        return self.document["inputs"]

    def head(self, site: int, head: int, input: int = 0) -> dict[str, Any]:
        """What is known of one head: of the ``site``-th call of a layer in the forward.

        Raises:
            IndexError: there is no such input, site or head.
        """
        return self.inputs[input]["layers"][site]["heads"][head]

    def summary(self, input: int = 0) -> str:
        """The explanation of one input in a few sentences."""
        return summarise(self.inputs[input])

    def to_dict(self) -> dict[str, Any]:
        return self.document

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.document, indent=indent, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON to ``path``, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(path, self.to_json(indent=1) + "\n")

    def __repr__(self) -> str:
        return f"Explanation({len(self.inputs)} inputs)"
