"""The figures: accuracy and latency against heads."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from headwise.apps.compare.verdict import front, shape_text  # noqa: E402
from headwise.io.files import write_atomic  # noqa: E402

_INK, _MUTED, _GRID, _PAPER = "#1c2430", "#5b6573", "#dfe3e8", "#ffffff"

# By the longest matching prefix of a method's name: mid tones, distinguishable between neighbours
# of a figure; dynamic methods have the strongest.
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
#: Points below the dense model from which on a model is left out of the front.
_WORTH = 6.0
_DASHED = ("subset-pipelined", "michel-exact-finetuned")  # lines beside one of their colour


def _colour(method: str, kind: str) -> str:
    known = [name for name in _COLOURS if method == name or method.startswith(f"{name}-")]
    if not known:  # a user's method
        return "#2f7de1" if kind == "dynamic" else "#8d959f"
    return _COLOURS[max(known, key=len)]


def _style(method: str, kind: str) -> dict:
    colour = _colour(method, kind)
    post_hoc = method.endswith("posthoc")
    return {
        "color": colour,
        "marker": "D" if kind == "dynamic" else "o",
        "markersize": 7 if kind == "dynamic" else 5.5,
        "linewidth": 2.2 if kind == "dynamic" else 1.3,
        "linestyle": ":" if post_hoc else "--" if method in _DASHED else "-",
        "markerfacecolor": _PAPER if post_hoc else colour,
    }


def _axes(figure: Figure, count: int, ylabel: str) -> list:
    found = figure.subplots(1, count, squeeze=False)[0]
    for axes in found:
        axes.set_facecolor("none")
        axes.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_GRID)
        axes.tick_params(colors=_MUTED, length=0)
        axes.set_xlim(0, 103)
        axes.set_xticks((0, 25, 50, 75, 100))
        axes.set_xlabel("average share of heads that run (%)", color=_MUTED)
    found[0].set_ylabel(ylabel, color=_MUTED)
    return list(found)


def _figure(panels: int, height: float = 4.4) -> Figure:
    return Figure(figsize=(max(11.0, 4.3 * panels), height), layout="constrained")


def _dense_line(axes, height: float) -> None:
    axes.axhline(height, color=_INK, linewidth=1.2, dashes=(5, 3), label="dense")


def _legend(figure: Figure, axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False,
        labelcolor=_INK, fontsize=9.5,
    )  # fmt: skip


def accuracy_figure(result: dict) -> Figure:
    """A panel for each task: test accuracy against the average share of heads."""
    tasks = result["tasks"]
    figure = _figure(len(tasks), 4.8)
    panels = _axes(figure, len(tasks), "test accuracy (%)")
    for axes, task in zip(panels, tasks, strict=True):
        own = [e for e in result["summary"] if e["task"] == task["name"]]
        dense = next(e for e in own if e["method"] == "dense")
        _dense_line(axes, 100 * dense["accuracy"])
        low = min(100 * e["accuracy"] for e in own)
        floor = max(low - 1.5, 100 * dense["accuracy"] - 16)
        for method in dict.fromkeys(e["method"] for e in own if e["kind"] != "dense"):
            line = sorted((e for e in own if e["method"] == method), key=lambda e: e["heads_mean"])
            x = [100 * e["heads_mean"] for e in line]
            y = [max(100 * e["accuracy"], floor) for e in line]
            style = _style(method, line[0]["kind"])
            axes.plot(x, y, label=line[0]["title"], **style)
            axes.errorbar(
                x, y, _intervals(line), fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.55
            )
        top = max(100 * e["accuracy"] for e in own)
        axes.set_ylim(floor - 0.6, top + 1.2)
        # A file name may hold a dollar sign, which is not a formula.
        axes.set_title(task["title"], color=_INK, fontsize=11, parse_math=False)
        if low < floor:
            axes.annotate(
                "on the axis: at or below it", (0.99, 0.015), xycoords="axes fraction",
                ha="right", fontsize=8.5, color=_MUTED,
            )  # fmt: skip
    _legend(figure, panels[0], 5)
    return figure


def _intervals(entries: list[dict]) -> list[list[float]]:
    """Percent of accuracy below and above each mean that its 95% interval reaches."""
    return [
        [max(0.0, 100 * (e["accuracy"] - e["accuracy_low"])) for e in entries],
        [max(0.0, 100 * (e["accuracy_high"] - e["accuracy"])) for e in entries],
    ]


def _reach(
    values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[list[float]]:
    """How far below and above each value its range reaches: 0 if the value is outside, because the
    ratio of two medians may be outside the quartiles of the ratios."""
    return [
        [max(0.0, value - end) for value, end in zip(values, low, strict=True)],
        [max(0.0, end - value) for value, end in zip(values, high, strict=True)],
    ]


def front_figure(result: dict) -> Figure:
    """A panel for each task: test accuracy against measured time in the first shape; the Pareto
    front is numbered and joined, the rest dim."""
    tasks = result["tasks"]
    figure = _figure(len(tasks), 5.2)
    panels = _axes(figure, len(tasks), "test accuracy (%)")
    for axes, task in zip(panels, tasks, strict=True):
        own = [e for e in result["summary"] if e["task"] == task["name"]]
        dense = next(e for e in own if e["method"] == "dense")
        best = [e for e in front(own) if 100 * (dense["accuracy"] - e["accuracy"]) <= _WORTH]
        slowest = 1.05 * max(e["latency"][0]["ratio"] for e in [dense, *best])
        near = [
            e
            for e in own
            if 100 * (dense["accuracy"] - e["accuracy"]) <= _WORTH
            and e["latency"][0]["ratio"] <= slowest
        ]
        rest = [e for e in near if e is not dense and not any(e is b for b in best)]
        for entries, colour in ((rest, "#aab2bd"), (best, "#1f66c1"), ([dense], _INK)):
            _points(axes, entries, colour)
        x = [e["latency"][0]["ratio"] for e in best]
        y = [100 * e["accuracy"] for e in best]
        axes.step(x, y, where="post", color="#1f66c1", linewidth=1.2)
        named = [f"{i}  {e['title']}, {e['heads_mean']:.0%}" for i, e in enumerate(best, 1)]
        for i, place in enumerate(zip(x, y, strict=True), 1):
            axes.annotate(str(i), place, (-9, 5), textcoords="offset points", fontsize=9)
        blank = [Line2D([], [], linestyle="none") for _ in named]
        axes.legend(
            blank, named, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
            handlelength=0, labelcolor=_INK, fontsize=9.5,
        )  # fmt: skip
        axes.autoscale()
        axes.set_xlim(0.95 * min(e["latency"][0]["ratio"] for e in near), slowest + 0.02)
        axes.set_xticks([tick / 10 for tick in range(1, 31) if min(x) <= tick / 10 <= slowest])
        axes.set_xlabel(f"time, dense = 1 ({shape_text(dense['latency'][0])})", color=_MUTED)
        axes.set_title(task["title"], color=_INK, fontsize=11, parse_math=False)
    return figure


def _points(axes, entries: list[dict], colour: str) -> None:
    """Accuracy against time with both intervals; diamonds choose heads for every input."""
    for e in entries:
        time = e["latency"][0]
        known = time["ratio_low"] is not None and time["ratio_high"] is not None
        spread = (
            _reach([time["ratio"]], [time["ratio_low"]], [time["ratio_high"]]) if known else None
        )
        axes.errorbar(
            time["ratio"], 100 * e["accuracy"], _intervals([e]), spread, color=colour,
            fmt={"dynamic": "D", "dense": "s"}.get(e["kind"], "o"), markersize=6, elinewidth=0.9,
        )  # fmt: skip


def latency_figure(result: dict) -> Figure:
    """A panel for each shape: measured time, dense = 1, against the average share of heads; a point
    for each method and budget, the mean over seeds (and tasks), with its range."""
    # Post-hoc and fine-tuned models of a plan have the same shape: one of them is enough.
    timed = [
        e for e in result["summary"] if e["kind"] != "dense" and not e["method"].endswith("posthoc")
    ]
    dense = [e for e in result["summary"] if e["method"] == "dense"]
    shapes = dense[0]["latency"]
    figure = _figure(len(shapes), 4.6)
    panels = _axes(figure, len(shapes), "time, dense = 1")
    for number, (axes, shape) in enumerate(zip(panels, shapes, strict=True)):
        _dense_line(axes, 1)
        noise = [e["latency"][number] for e in dense]
        if all(time["ratio_low"] is not None for time in noise):
            axes.axhspan(
                min(time["ratio_low"] for time in noise),
                max(time["ratio_high"] for time in noise),
                color=_GRID, alpha=0.6, linewidth=0,
            )  # fmt: skip
        for method in dict.fromkeys(e["method"] for e in timed):
            own = [e for e in timed if e["method"] == method]
            style = _style(method, own[0]["kind"]) | {"linewidth": 1.1}
            line = sorted(_over_tasks(own, number))
            x, y, low, high = zip(*line, strict=True)
            axes.plot(x, y, label=own[0]["title"], **style)
            axes.errorbar(
                x,
                y,
                _reach(y, low, high),
                fmt="none",
                ecolor=style["color"],
                elinewidth=1,
                alpha=0.55,
            )
        axes.set_title(shape_text(shape), color=_INK, fontsize=10.5)
    _legend(figure, panels[0], 5)
    return figure


def _at_least(axes, span: float) -> None:
    """A scale of at least ``span`` points: less than a point of accuracy must not look large."""
    low, high = axes.get_ylim()
    missing = max(0.0, span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def headroom_figure(result: dict) -> Figure:
    """A panel for each task: the accuracy of one plan, and of plans by the input, untrained."""
    rooms = [room for room in result["headroom"] if room["rows"]]
    figure = _figure(max(1, len(rooms)))
    panels = _axes(figure, max(1, len(rooms)), "accuracy without training (%)")
    lines = (
        ("one repaired plan", "static", "static", "-"),
        ("routed by the input", "routed", "dynamic", "-"),
        ("by the true cluster", "ceiling", "dynamic", ":"),
        ("another input's plan", "swapped", "random", "--"),
    )
    for axes, room in zip(panels, rooms, strict=False):
        _dense_line(axes, 100 * room["dense"])
        rows = sorted(room["rows"], key=lambda row: row["keep"])
        for place, (label, key, kind, dashes) in enumerate(lines):
            # Beside each other: equal values would hide one another.
            x = [100 * row["keep"] + 1.2 * (place - 1.5) for row in rows]
            style = _style("budget" if kind == "dynamic" else kind, kind)
            style |= {"linestyle": dashes, "linewidth": 1.8}
            if key == "ceiling":
                style["fillstyle"] = "none"
            axes.plot(x, [100 * row[key] for row in rows], label=label, **style)
        _at_least(axes, 5.0)
        axes.set_title(room["task"], color=_INK, fontsize=11, parse_math=False)
    _legend(figure, panels[0], 5)
    return figure


def _over_tasks(entries: list[dict], shape: int) -> Iterator[tuple[float, float, float, float]]:
    """(percent of heads, ratio, its lowest, its highest) of each budget of one method."""
    for keep in {e["keep_target"] for e in entries}:
        own = [e for e in entries if e["keep_target"] == keep]
        times = [e["latency"][shape] for e in own]
        yield (
            100 * sum(e["heads_mean"] for e in own) / len(own),
            sum(time["ratio"] for time in times) / len(times),
            min(time["ratio_low"] for time in times),
            max(time["ratio_high"] for time in times),
        )


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name, and what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[dict], Figure]


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
        "front",
        "Accuracy against measured time",
        "Further left is faster. Numbered models are those that no other beats in both; the rest "
        "is dim. Bars are 95% intervals of accuracy and the range of time over seeds.",
        front_figure,
    ),
    Drawing(
        "accuracy",
        "Accuracy against heads",
        "Diamonds choose heads for every input, circles use the same heads for all; dotted lines "
        "are post-hoc: pruned without training after. Bars are 95% intervals over seeds.",
        accuracy_figure,
    ),
    Drawing(
        "latency",
        "Measured latency against heads",
        "Median of interleaved rounds against the dense PyTorch model in the same rounds, the mean "
        "over seeds with their range (of one seed: quartiles of its rounds); below the dashed line "
        "is faster than dense. The band is dense measured against itself.",
        latency_figure,
    ),
)


def drawings(result: dict) -> list[Drawing]:
    """The figures that a result has something for."""
    rooms = [room for room in result.get("headroom", []) if room["rows"]]
    return [drawing for drawing in DRAWINGS if drawing.name != "headroom" or rooms]


def save_png(drawing: Drawing, result: dict, path: Path) -> None:
    """Writes the figure on white, atomically."""
    figure = drawing.draw(result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=_PAPER)
    write_atomic(path, buffer.getvalue())
