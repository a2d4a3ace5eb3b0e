"""The summary and the figure of prompt_families.py.

python benchmarks/prompt_families_summary.py prompts.json --json summary.json --png figure.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from headwise.analysis import metric_difference
from headwise.io.files import write_json
from matplotlib.figure import Figure
from torch import Tensor

INK, MUTED, GRID, STATIC, DYNAMIC = "#1c2430", "#5b6675", "#e3e7ec", "#8d959f", "#d9485f"

#: (method, label, colour, line, marker)
LINES = (
    ("michel-repaired", "static: michel, repaired", STATIC, ":", "o"),
    ("greedy-repaired", "static: greedy removal, repaired", "#2f7de1", "-", "o"),
    ("greedy-bank-by-family", "by the prompt: bank of plans, repaired", DYNAMIC, "-", "D"),
    (
        "greedy-bank-by-family, another plan",
        "the same with another family's plan",
        DYNAMIC,
        ":",
        "D",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the file that prompt_families.py wrote")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args()
    study = json.loads(options.study.read_text())
    rows = study["rows"]
    short = [{key: own for key, own in row.items() if key != "losses"} for row in rows]
    found = list(comparisons(rows))
    settings = study["settings"]
    write_json(options.json, {"settings": settings, "rows": short, "bank_against_static": found})
    for entry in found:
        print(
            f"seed {entry['seed']}, {entry['keep']:.1%} of the heads, {entry['steps']} steps: "
            f"{entry['dynamic']} {entry['change']:+.1%} ({entry['low']:+.1%} to "
            f"{entry['high']:+.1%}) against {entry['static']}"
        )
    if options.png:
        figure(rows).savefig(options.png, dpi=150)


def comparisons(rows: list[dict]) -> Iterator[dict]:
    """The perplexity of each bank over that of the best static model with the same number of heads
    and steps and the same seed, minus one, with the interval of a paired bootstrap over
    sequences."""
    rows = [row for row in rows if "losses" in row and row["method"] != "dense"]
    for row in rows:
        key = [row[name] for name in ("seed", "keep", "steps")]
        if "bank" not in row["method"] or "another" in row["method"]:
            continue
        others = [
            other
            for other in rows
            if "bank" not in other["method"]
            and [other[name] for name in ("seed", "keep", "steps")] == key
        ]
        if not others:
            continue
        static = min(others, key=lambda other: other["loss"])
        first, second = (torch.tensor(one["losses"]).flatten() for one in (row, static))
        apart = metric_difference(mean, first, second, torch.zeros(len(first)))
        change, low, high = (
            round(torch.tensor(end).expm1().item(), 4)
            for end in (apart.difference, apart.low, apart.high)
        )
        yield {
            **dict(zip(("seed", "keep", "steps"), key, strict=True)),
            "dynamic": row["method"],
            "static": static["method"],
            "change": change,
            "low": low,
            "high": high,
        }


def mean(losses: Tensor, _: Tensor) -> Tensor:
    return losses.double().mean()


def figure(rows: list[dict]) -> Figure:
    """Perplexity against the share of heads, without training; means and ranges over seeds."""
    drawn = Figure(figsize=(7.6, 4.0), layout="constrained", facecolor="white")
    axes = drawn.subplots()
    dense = [row["perplexity"] for row in rows if row["method"] == "dense"][0]
    axes.axhline(dense, color=INK, linewidth=1.2, dashes=(5, 3))
    axes.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                  textcoords="offset points", ha="right", color=INK)  # fmt: skip
    for method, label, colour, line, marker in LINES:
        own = [row for row in rows if row["method"] == method and row.get("steps") == 0]
        shares = sorted({row["keep"] for row in own})
        if not shares:
            continue
        values = [[row["perplexity"] for row in own if row["keep"] == share] for share in shares]
        means = [sum(some) / len(some) for some in values]
        x = [100 * share for share in shares]
        axes.plot(x, means, line, color=colour, marker=marker, linewidth=2, label=label)
        for at, some in zip(x, values, strict=True):
            axes.plot([at, at], [min(some), max(some)], color=colour, linewidth=4, alpha=0.3)
    axes.set_yscale("log")
    axes.set_yticks([30, 50, 100, 200], ["30", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_xscale("log")
    axes.set_xticks([12.5, 25, 50], ["12.5%", "25%", "50%"])
    axes.minorticks_off()
    axes.set_xlabel("attention heads that run", color=MUTED)
    axes.set_ylabel("perplexity of the continuation", color=MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0)
    axes.legend(frameon=False, fontsize=9)
    return drawn


if __name__ == "__main__":
    main()
