"""The figures of the page as PNG files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from headwise.apps.pages.documents import Documents  # noqa: E402
from headwise.io.display import signed_colours  # noqa: E402
from headwise.io.files import write_atomic  # noqa: E402

_ON, _OFF = "#1f66c1", "#b4430f"
#: Beyond this many tokens only some are named.
_NAMED = 45

#: (key of a head, title), best first: the first that an input has is drawn.
_MEASURES = (("relevance", "relevance"), ("effect", "effect"), ("weight", "weight"))


def write_figures(folder: Path, documents: Documents) -> list[Path]:
    """Draws everything in the documents; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in _drawings(documents):
        figure = draw()
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # A letter that is not in the font is drawn as a box; the page and the JSON have it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="png", dpi=150, facecolor="#ffffff")
        written.append(folder / f"{name}.png")
        write_atomic(written[-1], buffer.getvalue())
    if documents.compared is not None:
        written += _compared(folder, documents.compared)
    return written


def _compared(folder: Path, result: dict[str, Any]) -> list[Path]:
    from headwise.apps.compare.figures import drawings, save_png

    written = []
    for drawing in drawings(result):
        written.append(folder / f"{drawing.name}.png")
        save_png(drawing, result, written[-1])
    return written


def _drawings(documents: Documents) -> Iterator[tuple[str, Callable[[], Figure]]]:
    if documents.explanation is not None:
        for place, entry in enumerate(documents.explanation["inputs"], 1):
            yield f"input-{place}-heads", partial(_heads, entry)
            pairs = [(layer, head) for layer in entry["layers"] for head in layer["heads"]]
            pairs.sort(key=lambda pair: -abs(pair[1]["effect"] or 0.0))
            for layer, head in pairs:
                if head["attention"] is not None:
                    yield (
                        f"input-{place}-attention",
                        partial(_attention, entry, layer, head),
                    )
                    break
            for layer, head in pairs:
                if head["shares"]:
                    yield (
                        f"input-{place}-tokens",
                        partial(_tokens, entry, layer, head),
                    )
                    if entry.get("picture"):
                        yield f"input-{place}-patches", partial(_patches, entry, layer, head)
                    break
            if any(h["effect"] is not None and h["relevance"] is not None for _, h in pairs):
                yield f"input-{place}-effect", partial(_effect, pairs)
    if documents.use is not None:
        use = documents.use
        yield "use-heads", lambda: _frequency(use)
        if use["stability"]:
            yield "use-stability", lambda: _stability(use["stability"])
        if use["faithfulness"] is not None:
            yield "use-faithfulness", lambda: _faithfulness(use["faithfulness"])


def _text(text: str, length: int = 14) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair
    return text if len(text) <= length else text[: length - 1] + "…"


def _token(entry: dict[str, Any], place: int) -> str:
    tokens = entry["tokens"] or ()
    return _text(tokens[place]) if place < len(tokens) else f"token {place}"


def _grid(axes, layers: list[list[float | None]], low: float, high: float, colours: Any):
    """Layers from top to bottom; unknown values and missing heads are white."""
    import numpy as np

    width = max(1, *(len(row) for row in layers))
    values = np.full((len(layers), width), np.nan)
    for place, row in enumerate(layers):
        values[place, : len(row)] = [np.nan if v is None else v for v in row]
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(layers)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    return image


def _heads(entry: dict[str, Any]) -> Figure:
    """The grid of an input; a dot: ran."""
    heads = [layer["heads"] for layer in entry["layers"]]
    key, title = next(
        (m for m in _MEASURES if any(h[m[0]] is not None for row in heads for h in row)),
        _MEASURES[-1],
    )
    values = [[head[key] for head in row] for row in heads]
    most = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    figure = _figure(2.5 + 0.5 * max(map(len, values)), 1.6 + 0.42 * len(values))
    axes = figure.subplots()
    signed = any(v < 0 for row in values for v in row if v is not None)
    colours = signed_colours() if signed else "Blues"
    image = _grid(axes, values, -most if signed else 0.0, most, colours)
    figure.colorbar(image, label=title)
    for site, row in enumerate(heads):
        for head in row:
            if head["on"]:
                axes.plot(head["head"], site, "o", color="#1c2430", markeredgecolor="white")
    axes.set_title(f"{entry['heads_on']} of {entry['heads']} heads ran (dots)", fontsize=11)
    return figure


def _attention(entry: dict[str, Any], layer: dict[str, Any], head: dict[str, Any]) -> Figure:
    size = min(14.0, 3.0 + 0.22 * layer["keys"])
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    image = axes.imshow(head["attention"], cmap="Blues", vmin=0)
    figure.colorbar(image, label="weight", shrink=0.8)
    for ticks, names, count, turn in (
        (axes.set_xticks, axes.set_xticklabels, layer["keys"], 90),
        (axes.set_yticks, axes.set_yticklabels, layer["queries"], 0),
    ):
        places = range(0, count, -(-count // _NAMED) or 1)
        ticks(places)
        labels = [_token(entry, place) for place in places]
        names(labels, rotation=turn, fontsize=8, parse_math=False)
    axes.set_xlabel("looks at")
    axes.set_title(f"attention of layer {layer['site']} head {head['head']}", fontsize=11)
    return figure


def _tokens(entry: dict[str, Any], layer: dict[str, Any], head: dict[str, Any]) -> Figure:
    shares = head["shares"]
    figure = _figure(6.5, min(30.0, 1.4 + 0.2 * len(shares)))
    axes = figure.subplots()
    axes.barh(range(len(shares)), shares, color=[_ON if v >= 0 else _OFF for v in shares])
    axes.set_yticks(range(len(shares)))
    labels = [_token(entry, place) for place in range(len(shares))]
    axes.set_yticklabels(labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="#1c2430", linewidth=0.8)
    axes.set_xlabel(f"share in the relevance of layer {layer['site']} head {head['head']}")
    return figure


def _patches(entry: dict[str, Any], layer: dict[str, Any], head: dict[str, Any]) -> Figure:
    """The picture, and beside it the share of each patch in a head's relevance."""
    own = entry["picture"]
    shares = head["shares"][own["first"] :]
    rows = [shares[r * own["columns"] : (r + 1) * own["columns"]] for r in range(own["rows"])]
    most = max(map(abs, shares), default=0.0) or 1.0
    figure = _figure(7.5, 3.4)
    whole, told = figure.subplots(1, 2)
    for axes in (whole, told):
        axes.imshow(own["pixels"], cmap="gray", extent=(0, own["columns"], own["rows"], 0))
        axes.set_xticks([])
        axes.set_yticks([])
    whole.set_title(_text(entry["text"] or "", 40), fontsize=10, parse_math=False)
    extent = (0, own["columns"], own["rows"], 0)
    image = told.imshow(
        rows, cmap=signed_colours(), vmin=-most, vmax=most, alpha=0.7, extent=extent
    )
    figure.colorbar(image, ax=told, label="share in the relevance")
    ran = "ran" if head["on"] else "slept"
    told.set_title(f"layer {layer['site']} head {head['head']}, which {ran}", fontsize=10)
    return figure


def _effect(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Figure:
    figure = _figure(6.5, 4.5)
    axes = figure.subplots()
    for on, marker, colour, label in ((True, "o", _ON, "ran"), (False, "D", _OFF, "slept")):
        own = [
            head
            for _, head in pairs
            if head["on"] == on and head["relevance"] is not None and head["effect"] is not None
        ]
        x, y = [h["relevance"] for h in own], [h["effect"] for h in own]
        face = colour if on else "none"
        axes.scatter(x, y, marker=marker, edgecolors=colour, facecolors=face, label=label)
    axes.set_xlabel("relevance")
    axes.set_ylabel("effect on log-probability")
    axes.legend()
    return figure


def _frequency(document: dict[str, Any]) -> Figure:
    """How often each head runs: for all texts, and for those of each predicted class."""
    layers = document["use"]["layers"]
    classes = document["data"]["classes"]
    panels = [("all texts", [[head["frequency"] for head in layer["heads"]] for layer in layers])]
    for place, name in enumerate(classes[:6]):
        rows = [[head["by_class"][place] for head in layer["heads"]] for layer in layers]
        panels.append((f"predicted {_text(name, 24)}", rows))
    width = max((layer["num_heads"] for layer in layers), default=1)
    figure = _figure((1.5 + 0.3 * width) * len(panels), 1.6 + 0.35 * len(layers))
    found = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(found, panels, strict=True):
        image = _grid(axes, rows, 0.0, 1.0, "Blues")
        axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=list(found), label="share of texts for which it runs")
    return figure


def _stability(rows: list[dict[str, Any]]) -> Figure:
    figure = _figure(7.0, 1.6 + 0.45 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    spread = [[r["jaccard"] - r["low"] for r in rows], [r["high"] - r["jaccard"] for r in rows]]
    values = [row["jaccard"] for row in rows]
    axes.errorbar(values, places, xerr=spread, fmt="o", color=_ON, label="same text, changed")
    others = [row["jaccard_other_inputs"] for row in rows]
    axes.plot(others, places, "D", color=_OFF, fillstyle="none", label="another text")
    axes.set_yticks(places)
    axes.set_yticklabels([_text(row["name"], 40) for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("overlap of the heads that run (Jaccard)")
    axes.legend(loc="lower left")
    return figure


def _faithfulness(faith: dict[str, Any]) -> Figure:
    figure = _figure(6.5, 4.2)
    axes = figure.subplots()
    x = [100 * share for share in faith["removed"]]
    axes.plot(x, faith["stated"], "o-", color=_ON, label="in the stated order")
    axes.plot(x, faith["random"], "D--", color=_OFF, fillstyle="none", label="at random")
    axes.set_xlabel("heads removed (%)")
    axes.set_ylabel("log-probability of the prediction")
    axes.legend()
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")
