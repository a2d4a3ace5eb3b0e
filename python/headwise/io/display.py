"""Displaying results: in a notebook, as a matplotlib figure, as a pandas table.

A result describes its contents once (:class:`Shown`): rows of a table and, if it has a value per
head or a matrix, a :class:`Grid`. Everything displayed is made from these two.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headwise.io.printable import printable

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Grid", "Shown", "layer_labels", "shown"]

#: Colours (red, green, blue) of values above and below 0; the background is the notebook's.
_ABOVE, _BELOW = (31, 102, 193), (180, 67, 15)
#: Rows of a table that a notebook shows.
_MOST = 60


@dataclass(frozen=True)
class Grid:
    """Numbers in rows and columns, drawn as shades: from 0 to the largest absolute value.

    Attributes:
        title: one line.
        rows: names of the rows.
        columns: names of the columns.
        values: ``[rows][columns]``; None, or a row that ends early: no value.
        row_title: what the rows are.
        column_title: what the columns are.
        digits: decimals of the numbers; None: as short as possible.
        numbers: write the numbers into the cells; False: a mark where they are not 0.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_title: str = "layer"
    column_title: str = "head"
    digits: int | None = None
    numbers: bool = True

    @staticmethod
    def of_heads(title: str, values: Mapping[str, Iterable[float | None]], **options: Any) -> Grid:
        """From layer name -> one value per head; names lose their common parts."""
        cells = [list(row) for row in values.values()]
        most = max(map(len, cells), default=0)
        names = layer_labels(list(values))
        return Grid(title, names, [str(head) for head in range(most)], cells, **options)

    @property
    def largest(self) -> float:
        """The largest absolute value; 1 if there is none above 0."""
        finite = [abs(v) for row in self.values for v in row if v is not None and math.isfinite(v)]
        return max(finite, default=0.0) or 1.0

    def text(self, value: float) -> str:
        if not self.numbers:
            return "●" if value else ""
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return f"{value:.2f}" if 0.095 <= self.largest < 1000 else f"{value:.1e}"


class Shown:
    """Mixed into results, which implement ``_records`` and, if they have one, ``_grid``."""

    def _records(self) -> list[dict[str, Any]]:
        """The rows of the table, with the same keys each."""
        raise NotImplementedError

    def _grid(self) -> Grid | None:
        """The grid to draw; None: only the table."""
        return None

    def to_frame(self) -> pandas.DataFrame:
        """The result as a ``pandas.DataFrame``, in long form: one row per head, pair or budget.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_frame needs pandas: pip install pandas") from None
        return pandas.DataFrame(self._records())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the result with matplotlib.

        Args:
            ax: matplotlib axes; None: new ones from ``matplotlib.pyplot.subplots``.

        Returns:
            The axes, for your own titles and labels.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is nothing to draw.
        """
        grid = self._grid()
        if grid is None:
            raise NotImplementedError
        return draw(grid, ax)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        grid = self._grid()
        return table_html(self._records()) if grid is None else _grid_html(grid)


def shown(
    kind: type,
    records: Callable[[Any], list[dict[str, Any]]],
    grid: Callable[[Any], Grid | None],
    html: Callable[[Any], str] = Shown._repr_html_,
) -> None:
    """Gives a class of the C++ core the methods of :class:`Shown`."""
    methods = {"to_frame": Shown.to_frame, "plot": Shown.plot, "_repr_html_": html}
    for name, method in {**methods, "_records": records, "_grid": grid}.items():
        setattr(kind, name, method)  # mypy knows these types from their stubs


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or new axes of a figure of ``size`` in inches."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def layer_labels(names: Sequence[str]) -> list[str]:
    """Names of layers without the dotted parts that all begin and end with."""
    if len(names) < 2:
        return [name or "(the model)" for name in names]
    parts = [name.split(".") for name in names]
    begin = len(os.path.commonprefix(parts))
    end = len(os.path.commonprefix([own[begin:][::-1] for own in parts]))
    shortened = [".".join(own[begin : len(own) - end]) for own in parts]
    return shortened if all(shortened) else list(names)


def per_head(values: Mapping[str, Tensor | Sequence[Any]], key: str) -> list[dict[str, Any]]:
    """Layer name -> ``[H]`` as records ``layer``, ``head`` and ``key``."""
    return [
        {"layer": name, "head": head, key: value}
        for name, row in values.items()
        for head, value in enumerate(row.tolist() if isinstance(row, Tensor) else row)
    ]


def signed_colours() -> Any:
    """The colours of matplotlib for values below and above 0, as tables and pages have them."""
    from matplotlib.colors import LinearSegmentedColormap

    below, above = (tuple(part / 255 for part in colour) for colour in (_BELOW, _ABOVE))
    return LinearSegmentedColormap.from_list("headwise", [below, (1.0, 1.0, 1.0), above])


def draw(grid: Grid, ax: Axes | None) -> Axes:
    """See :meth:`Shown.plot`."""
    if not grid.rows or not grid.columns:
        raise ValueError("plot has nothing to draw: there are no heads")
    size = (max(4.0, 0.5 * len(grid.columns) + 2.0), max(1.6, 0.32 * len(grid.rows) + 1.1))
    ax = new_axes(ax, size)
    limit = grid.largest
    width = len(grid.columns)
    cells = [
        [math.nan if value is None else value for value in row] + [math.nan] * (width - len(row))
        for row in grid.values
    ]
    signed = any(value < 0 for row in cells for value in row)
    ax.set_facecolor("#e4e4e4")  # cells without a number
    image = ax.imshow(cells, cmap=signed_colours(), vmin=-limit, vmax=limit, aspect="auto")
    if grid.numbers:
        ax.figure.colorbar(image, ax=ax).ax.set_ylim(-limit if signed else 0.0, limit)
    ax.set_xticks(range(width), grid.columns)
    ax.set_yticks(range(len(grid.rows)), [printable(row, 40) for row in grid.rows])
    ax.set(title=printable(grid.title, 80), xlabel=grid.column_title, ylabel=grid.row_title)
    if len(grid.rows) * width <= 200:
        for row, own in enumerate(cells):
            for column, value in enumerate(own):
                if math.isfinite(value):
                    dark = abs(value) > 0.55 * limit
                    ax.text(column, row, grid.text(value), ha="center", va="center", fontsize=8,
                            color="white" if dark else "black")  # fmt: skip
    return ax


def _grid_html(grid: Grid) -> str:
    cell = "padding:2px 6px;text-align:right;font-variant-numeric:tabular-nums"
    head = "".join(f'<th style="{cell}">{_escaped(name)}</th>' for name in grid.columns)
    corner = f"{grid.row_title} \\ {grid.column_title}"
    rows = []
    for name, values in list(zip(grid.rows, grid.values, strict=True))[:_MOST]:
        cells = []
        for value in values:
            if value is None or not math.isfinite(value):
                cells.append(f'<td style="{cell}"></td>')
                continue
            colour = ",".join(map(str, _ABOVE if value >= 0 else _BELOW))
            shade = f"background:rgba({colour},{0.6 * abs(value) / grid.largest:.2f})"
            cells.append(
                f'<td style="{cell};{shade}" title="{value:.6g}">{_escaped(grid.text(value))}</td>'
            )
        label = f'<th style="{cell}">{_escaped(name)}</th>'
        rows.append(f"<tr>{label}{''.join(cells)}</tr>")
    return (
        f'<div style="overflow-x:auto"><p>{_escaped(grid.title)}</p><table style="border-collapse:'
        f'collapse"><thead><tr><th style="{cell}">{_escaped(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{_rest(len(grid.rows))}</div>"
    )


def table_html(records: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return _escaped(
            f"{value:.4g}" if isinstance(value, float) else "" if value is None else value
        )

    columns = list(records[0]) if records else []
    head = "".join(f"<th>{_escaped(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{cell(record[name])}</td>' for name in columns)}</tr>"
        for record in records[:_MOST]
    )
    return (
        f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        f"</table>{_rest(len(records))}</div>"
    )


def _rest(rows: int) -> str:
    return f"<p>and {rows - _MOST} more rows</p>" if rows > _MOST else ""


def _escaped(value: Any) -> str:
    return html.escape(printable(str(value)))
