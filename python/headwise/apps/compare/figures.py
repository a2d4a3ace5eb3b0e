"""The figures: accuracy against heads, latency against heads, and where dynamic starts to pay."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from headwise.apps.compare.findings import shape_text  # noqa: E402
from headwise.apps.compare.store import write_atomically  # noqa: E402


@dataclass(frozen=True)
class Palette:
    """The colours that depend on the background."""

    ink: str
    muted: str
    grid: str
    paper: str


ON_WHITE = Palette("#1c2430", "#5b6573", "#dfe3e8", "#ffffff")
# Stand-ins that svg() replaces by the page's variables: one drawing serves light and dark.
_ON_PAGE = Palette("#010101", "#020202", "#030303", "#040404")
_VARIABLES = {
    _ON_PAGE.ink: "var(--ink)",
    _ON_PAGE.muted: "var(--muted)",
    _ON_PAGE.grid: "var(--line)",
    _ON_PAGE.paper: "var(--paper)",
}

# By what a method's name begins with, the longest that fits: mid tones, legible on white and on
# near-black, in which neighbours of a figure can be told apart; dynamic methods have the strongest.
_COLOURS = {
    "random": "#8d959f",
    "michel": "#c98a1b",
    "michel-exact": "#a35f2a",
    "hies": "#3f9a6d",
    "static": "#8a6fd1",
    "subset": "#2aa3a3",
    "sleeping": "#7d9a2e",
    "kwon": "#6b7fb0",
    "cofi": "#c77aa8",
    "dense": "#5b6573",
    "budget": "#2f7de1",
    "budget-fixed": "#6ea8ee",
    "budget-unannealed": "#7c6ff0",
    "budget-random": "#9aa4b2",
    "budget-full": "#1f9bbf",
    "dynamic": "#d9485f",
    "requested": "#e07b39",
    "adavit": "#c044c0",
    "shared": "#18a058",
    "threshold": "#4fb3d9",
}
_DASHED = ("subset-pipelined", "michel-exact-finetuned")  # lines beside one of their colour


def _colour(method: str, kind: str) -> str:
    known = [name for name in _COLOURS if method == name or method.startswith(f"{name}-")]
    if not known:  # a method of the user's own
        return "#2f7de1" if kind == "dynamic" else "#8d959f"
    return _COLOURS[max(known, key=len)]


def _style(method: str, kind: str, palette: Palette) -> dict:
    colour = _colour(method, kind)
    post_hoc = method.endswith("posthoc")
    return {
        "color": colour,
        "marker": "D" if kind == "dynamic" else "o",
        "markersize": 7 if kind == "dynamic" else 5.5,
        "linewidth": 2.2 if kind == "dynamic" else 1.3,
        "linestyle": ":" if post_hoc else "--" if method in _DASHED else "-",
        "markerfacecolor": palette.paper if post_hoc else colour,
    }


def _axes(figure: Figure, count: int, ylabel: str, palette: Palette) -> list:
    found = figure.subplots(1, count, squeeze=False)[0]
    for axes in found:
        axes.set_facecolor("none")
        axes.grid(True, color=palette.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(palette.grid)
        axes.tick_params(colors=palette.muted, length=0)
        axes.set_xlim(0, 103)
        axes.set_xticks((0, 25, 50, 75, 100))
        axes.set_xlabel("average share of heads that run (%)", color=palette.muted)
    found[0].set_ylabel(ylabel, color=palette.muted)
    return list(found)


def _figure(panels: int, height: float = 4.4) -> Figure:
    return Figure(figsize=(max(11.0, 4.3 * panels), height), layout="constrained")


def _dense_line(axes, height: float, palette: Palette) -> None:
    axes.axhline(height, color=palette.ink, linewidth=1.2, dashes=(5, 3), label="dense")


def _legend(figure: Figure, axes, columns: int, palette: Palette) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False,
        labelcolor=palette.ink, fontsize=9.5,
    )  # fmt: skip


def accuracy_figure(result: dict, palette: Palette) -> Figure:
    """A panel for each task: test accuracy against the average share of heads."""
    tasks = result["tasks"]
    figure = _figure(len(tasks), 4.8)
    panels = _axes(figure, len(tasks), "test accuracy (%)", palette)
    for axes, task in zip(panels, tasks, strict=True):
        own = [e for e in result["summary"] if e["task"] == task["name"]]
        dense = next(e for e in own if e["method"] == "dense")
        axes.axhline(
            100 * dense["accuracy"], color=palette.ink, linewidth=1.2, dashes=(5, 3), label="dense"
        )
        low = min(100 * e["accuracy"] for e in own)
        floor = max(low - 1.5, 100 * dense["accuracy"] - 16)
        for method in dict.fromkeys(e["method"] for e in own if e["kind"] != "dense"):
            line = sorted((e for e in own if e["method"] == method), key=lambda e: e["heads_mean"])
            x = [100 * e["heads_mean"] for e in line]
            y = [max(100 * e["accuracy"], floor) for e in line]
            style = _style(method, line[0]["kind"], palette)
            axes.plot(x, y, label=line[0]["title"], **style)
            if line[0]["seeds"] > 1:
                spread = [
                    [max(0.0, 100 * (e["accuracy"] - e["accuracy_low"])) for e in line],
                    [max(0.0, 100 * (e["accuracy_high"] - e["accuracy"])) for e in line],
                ]
                axes.errorbar(
                    x, y, spread, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.55
                )
        top = max(100 * e["accuracy"] for e in own)
        axes.set_ylim(floor - 0.6, top + 1.2)
        # A file name may hold a dollar sign, which is not a formula.
        axes.set_title(task["title"], color=palette.ink, fontsize=11, parse_math=False)
        if low < floor:
            axes.annotate(
                "on the axis: at or below it", (0.99, 0.015), xycoords="axes fraction",
                ha="right", fontsize=8.5, color=palette.muted,
            )  # fmt: skip
    _legend(figure, panels[0], 5, palette)
    return figure


def latency_figure(result: dict, palette: Palette) -> Figure:
    """A panel for each shape: measured time, dense = 1, against the average share of heads."""
    shapes = result["runs"][0]["latency"]
    figure = _figure(len(shapes), 4.6)
    panels = _axes(figure, len(shapes), "time, dense = 1", palette)
    for number, (axes, shape) in enumerate(zip(panels, shapes, strict=True)):
        _dense_line(axes, 1, palette)
        points: dict[str, list[tuple[float, float]]] = {}
        looks: dict[str, tuple[str, dict]] = {}
        for run in result["runs"]:
            # Post-hoc and fine-tuned models of a plan have the same shape: one of them is enough.
            if run["kind"] == "dense" or run["method"].endswith("posthoc"):
                continue
            points.setdefault(run["method"], []).append(
                (100 * run["heads_mean"], run["latency"][number]["ratio"])
            )
            looks[run["method"]] = (run["title"], _style(run["method"], run["kind"], palette))
        for method, found in points.items():
            title, style = looks[method]
            found.sort()
            axes.plot(*zip(*found, strict=True), label=title, **style | {"linewidth": 1.1})
        axes.set_title(shape_text(shape), color=palette.ink, fontsize=10.5)
    _legend(figure, panels[0], 5, palette)
    return figure


def break_even_figure(result: dict, palette: Palette) -> Figure:
    """A panel for each shape: dynamic and pruned models with equally many heads a layer."""
    shapes = result["break_even"]["shapes"]
    figure = _figure(len(shapes))
    panels = _axes(figure, len(shapes), "time, dense = 1", palette)
    for axes, shape in zip(panels, shapes, strict=True):
        x = [100 * share for share in shape["heads"]]
        _dense_line(axes, 1, palette)
        axes.plot(x, shape["static_ratio"], label="pruned", **_style("static", "static", palette))
        axes.plot(
            x, shape["dynamic_ratio"], label="dynamic", **_style("budget", "dynamic", palette)
        )
        share = shape["break_even_heads"]
        if share is not None and share < x[-1] / 100:
            axes.axvline(100 * share, color=_COLOURS["budget"], linewidth=1, dashes=(2, 2))
            axes.annotate(
                f"pays up to {share:.0%}", (100 * share, 0.03), xycoords=("data", "axes fraction"),
                ha="right" if share > 0.4 else "left", xytext=(-5 if share > 0.4 else 5, 0),
                textcoords="offset points", color=palette.ink, fontsize=9.5,
            )  # fmt: skip
        axes.set_title(shape_text(shape), color=palette.ink, fontsize=10.5)
    _legend(figure, panels[0], 3, palette)
    return figure


def headroom_figure(result: dict, palette: Palette) -> Figure:
    """A panel for each task: what one plan leaves, and what plans by the input win, untrained."""
    rooms = [room for room in result["headroom"] if room["rows"]]
    figure = _figure(max(1, len(rooms)))
    panels = _axes(figure, max(1, len(rooms)), "accuracy without training (%)", palette)
    lines = (
        ("one repaired plan", "static", "static", "-"),
        ("routed by the input", "routed", "dynamic", "-"),
        ("by the true cluster", "ceiling", "dynamic", ":"),
        ("another input's plan", "swapped", "random", "--"),
    )
    for axes, room in zip(panels, rooms, strict=False):
        _dense_line(axes, 100 * room["dense"], palette)
        rows = sorted(room["rows"], key=lambda row: row["keep"])
        x = [100 * row["keep"] for row in rows]
        for label, key, kind, dashes in lines:
            style = _style("budget" if kind == "dynamic" else kind, kind, palette)
            style |= {"linestyle": dashes, "linewidth": 1.8}
            axes.plot(x, [100 * row[key] for row in rows], label=label, **style)
        axes.set_title(room["task"], color=palette.ink, fontsize=11, parse_math=False)
    _legend(figure, panels[0], 5, palette)
    return figure


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name, and what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[dict, Palette], Figure]


DRAWINGS = (
    Drawing(
        "headroom",
        "Headroom: before any training",
        "Pruned by importance and repaired by least squares: one plan for all inputs, and several "
        "plans of the same size, picked by the router, by the true domain or cluster, and by that "
        "of another input.",
        headroom_figure,
    ),
    Drawing(
        "accuracy",
        "Accuracy against heads",
        "Diamonds choose heads for every text, circles use the same heads for all; dotted lines "
        "are post-hoc: pruned without training after. Bars are 95% intervals over seeds.",
        accuracy_figure,
    ),
    Drawing(
        "latency",
        "Measured latency against heads",
        "Median of interleaved rounds against the dense PyTorch model in the same rounds; below "
        "the dashed line is faster than dense.",
        latency_figure,
    ),
    Drawing(
        "break-even",
        "Where dynamic starts to pay",
        "Dynamic selection and a pruned model with the same number of heads in every layer, "
        "against dense. The gap between the two lines is the price of the freedom to choose.",
        break_even_figure,
    ),
)


def svg(drawing: Drawing, result: dict) -> str:
    """The figure for a page: no fixed size, no fonts of its own, the page's colours."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        drawing.draw(result, _ON_PAGE).savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None}
        )
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    # A fixed size would overflow a narrow page; the view box keeps the proportions.
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    return f'{head} role="img" aria-label="{drawing.title}">{rest}'


def save_png(drawing: Drawing, result: dict, path: Path) -> None:
    """The figure on white, whole or not at all."""
    figure = drawing.draw(result, ON_WHITE)
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150, facecolor="#ffffff"))
