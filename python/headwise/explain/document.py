"""An explanation as a document: JSON that a page, a notebook or another program reads."""

from __future__ import annotations

import html
import json
import os
from typing import TYPE_CHECKING, Any

from headwise.explain.differences import differences
from headwise.explain.summary import summarise
from headwise.io.checked import check_whole_number
from headwise.io.display import Grid, Shown, draw, table_html
from headwise.io.files import write_atomic
from headwise.io.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Explanation(Shown):
    """The result of :func:`headwise.explain` for each input of a batch.

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
        """The entry of one head in the ``site``-th call of a layer in the forward.

        Raises:
            TypeError: one of them is not a whole number.
            IndexError: the input, site or head does not exist.
        """
        layers = _entry("input", self.inputs, input)["layers"]
        return _entry("head", _entry("site", layers, site)["heads"], head)

    def summary(self, input: int = 0) -> str:
        """The explanation of one input in a few sentences."""
        return summarise(_entry("input", self.inputs, input))

    def _records(self) -> list[dict[str, Any]]:
        keys = ("on", "weight", "relevance", "rank", "margin", "effect")
        return [
            {
                "input": place,
                "layer": layer["name"],
                "site": layer["site"],
                "head": head["head"],
                **{key: head[key] for key in keys},
            }
            for place, entry in enumerate(self.inputs)
            for layer in entry["layers"]
            for head in layer["heads"]
        ]

    def _grid(self, input: int = 0) -> Grid:
        entry = self.inputs[input]
        heads = [head for layer in entry["layers"] for head in layer["heads"]]
        measured = any(head["effect"] is not None for head in heads)
        title = f"input {input}: {entry['heads_on']} of {entry['heads']} heads ran"
        if measured:
            title += "; effect of each on the prediction"
        values = [
            [head["effect"] if measured else float(head["on"]) for head in layer["heads"]]
            for layer in entry["layers"]
        ]
        rows = [str(layer["site"]) for layer in entry["layers"]]
        columns = [str(head) for head in range(max(map(len, values), default=0))]
        return Grid(title, rows, columns, values, numbers=measured)

    def plot(self, ax: Axes | None = None, input: int = 0) -> Axes:
        """Plots one input's heads: their effects or, if none was measured, which ran.

        Args:
            ax: matplotlib axes; None: new ones.
            input: its number.

        Raises:
            IndexError: the input does not exist.
        """
        return draw(self._grid(input), ax)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        sentences = html.escape(printable(self.summary(), 4000)) if self.inputs else "no input"
        return f"<p>{sentences}</p>{super()._repr_html_() if self.inputs else ''}"

    def differences(self, first: int = 0, second: int = 1) -> list[dict[str, Any]]:
        """Which heads ran for only one of two inputs, and because of which words.

        Returns:
            A dictionary for each head, sorted by the distance of the margins: ``layer``, ``site``,
            ``head``, ``ran_for`` (0: ``first``, 1: ``second``), ``margins``, and the tokens with
            the largest shares, as (token, share): ``spoke_for`` in the input that ran it,
            ``spoke_against`` in the other.

        Raises:
            IndexError: the input does not exist.
        """
        one, other = (
            _entry(name, self.inputs, place)
            for name, place in (("first", first), ("second", second))
        )
        return differences(one, other)

    def to_dict(self) -> dict[str, Any]:
        return self.document

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.document, indent=indent, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON to ``path`` atomically.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(path, self.to_json(indent=1) + "\n")

    def __repr__(self) -> str:
        return f"Explanation({len(self.inputs)} inputs)"


def _entry(name: str, entries: list[dict[str, Any]], place: int) -> dict[str, Any]:
    check_whole_number(name, place)
    if not 0 <= place < len(entries):
        raise IndexError(f"{name} must be in 0..{len(entries) - 1}, got {place}")
    return entries[place]


class Roles(Shown, dict[str, Any]):
    """The result of :func:`headwise.head_roles`: a document of format ``headwise.roles``
    (docs/interpretability.md) with a table and a plot."""

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer["name"],
                "site": layer["site"],
                "head": head["head"],
                "role": f"{role['role']} {role['detail']}".strip(),
                **{key: role[key] for key in ("share", "low", "high", "baseline", "trials")},
            }
            for layer in self["layers"]
            for head in layer["heads"]
            for role in head["roles"]
        ]

    def _grid(self) -> Grid:
        values = [
            [max((role["share"] for role in head["roles"]), default=None) for head in own["heads"]]
            for own in self["layers"]
        ]
        count = sum(bool(head["roles"]) for own in self["layers"] for head in own["heads"])
        title = f"{count} heads have a role: share of the trials"
        columns = [str(head) for head in range(max(map(len, values), default=0))]
        return Grid(title, [str(own["site"]) for own in self["layers"]], columns, values)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"{super()._repr_html_()}{table_html(self._records())}"
