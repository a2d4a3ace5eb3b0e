"""The table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from headwise.apps.compare.heads_of_kinds import (
    SIGNIFICANT,
    WORTH,
    ablation_rows,
    roles_of,
    stay_rows,
)
from headwise.explain.role_counts import KINDS

COLUMNS = (
    ("method", "how the heads are chosen"),
    ("accuracy", "on the test, with its 95% interval"),
    ("vs dense", "points of accuracy gained or lost"),
    ("heads", "average share of the heads that ran on the test; ! = over 2 points off target"),
    ("spread", "standard deviation of that share from input to input, in points"),
    ("differ", "mean Jaccard distance of the heads of two inputs; 0 = always the same heads"),
    ("time", "measured latency, dense = 1; of dense itself, quartiles of measuring it again"),
    ("attn MACs", "multiply-accumulates of attention, gates included, dense = 1"),
    ("took", "seconds that the method took: scores, training, choosing on validation inputs"),
)

#: Further columns of a study that measured energy.
ENERGY_COLUMNS = (
    ("energy", "joules above the idle power, dense = 1; of dense itself, joules per input"),
    ("processor", "a proxy of energy: processor seconds, dense = 1"),
    ("MACs", "a proxy of energy: multiply-accumulates of the whole model, dense = 1"),
    ("bytes", "a proxy of energy: bytes of weights and of caches read, dense = 1"),
)


def columns(summary: Sequence[dict]) -> tuple[tuple[str, str], ...]:
    """(name, meaning) of each column."""
    found = COLUMNS + (ENERGY_COLUMNS if any("energy" in e for e in summary) else ())
    if "metric" not in summary[0]:
        return found
    title = summary[0]["metric"]["title"]
    return (*found[:2], (title, "times 100, on the test, with its 95% interval"), *found[2:])


def cells(entry: dict, dense: dict) -> list[str]:
    """One row, one text per column."""
    dynamic = entry["kind"] == "dynamic"
    own = entry is dense
    metric = (
        [_hundredths(*(entry["metric"][key] for key in ("value", "low", "high")))]
        if ("metric" in entry)
        else []
    )
    return [
        entry["title"],
        f"{100 * entry['accuracy']:.1f}% "
        f"({100 * entry['accuracy_low']:.1f}-{100 * entry['accuracy_high']:.1f})",
        *metric,
        "" if own else f"{100 * (entry['accuracy'] - dense['accuracy']):+.1f}",
        f"{100 * entry['heads_mean']:.1f}%" + ("!" if entry["missed"] else ""),
        f"{100 * entry['heads_std']:.1f}" if dynamic else "",
        f"{entry['jaccard_distance']:.2f}" if dynamic else "",
        _time(entry["latency"][0], own),
        f"{entry['attention_macs_ratio_to_dense']:.2f}",
        f"{entry['method_seconds']:.0f}" if "method_seconds" in entry else "",
        *(_energy(entry["energy"], own) if "energy" in entry else ()),
    ]


def _hundredths(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _energy(found: dict, own: bool) -> list[str]:
    joules = found["joules"]
    text = "not measured"
    if joules is not None:
        text = f"{joules['ratio']:.2f} ({joules['low']:.2f}-{joules['high']:.2f})"
        if own:
            text = f"1 ({found['joules_per_input']:.2g} J)"
    proxies = (found[name] for name in ("processor_seconds", "macs", "bytes"))
    return [text, *("1" if own else f"{value:.2f}" for value in proxies)]


def _time(time: dict, own: bool) -> str:
    if not own:
        return f"{time['ratio']:.2f}"
    low, high = time["ratio_low"], time["ratio_high"]
    return "1" if low is None else f"1 ({low:.2f}-{high:.2f})"


def domain_cells(entry: dict) -> list[str]:
    """One row of the table of domains: the method, then accuracy and share of heads of each."""
    return [
        entry["title"],
        *(f"{100 * d['accuracy']:.1f}% {100 * d['heads_mean']:.0f}%h" for d in entry["domains"]),
    ]


def domain_columns(entries: Sequence[dict]) -> list[str]:
    """The heading of the table of domains; empty if the task has one domain."""
    if "domains" not in entries[0]:
        return []
    return ["method", *(domain["name"] for domain in entries[0]["domains"])]


def grouped(summary: Sequence[dict], task: str) -> list[tuple[str, list[dict]]]:
    """(heading, entries) of a task: dense first, then each budget, the largest first."""
    own = [entry for entry in summary if entry["task"] == task]
    groups = [("all heads", [e for e in own if e["kind"] == "dense"])]
    for keep in sorted({e["keep_target"] for e in own if e["kind"] != "dense"}, reverse=True):
        entries = [e for e in own if e["kind"] != "dense" and e["keep_target"] == keep]
        groups.append((f"{keep:.0%} of the heads", entries))
    return groups


def _aligned(header: Sequence[str], rows: Sequence[list[str] | str]) -> list[str]:
    """A table: rows that are strings are headings over the full width."""
    table = [header, *(row for row in rows if not isinstance(row, str))]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    top = line(header)
    return [top, "-" * len(top), *(row if isinstance(row, str) else line(row) for row in rows)]


def attention_tables(result: dict, task: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Of an encoder-decoder, (title, headings, rows): what each head is worth, and which stay."""
    tables = []
    for found in result.get("attention", ()):
        if found["task"] != task:
            continue
        heads = [str(head) for head in range(max(len(o["only"]) for o in found["layers"]))]
        title = (
            f"Change of BLEU without each head ({found['messages']} messages, dense "
            f"{found['bleu']:.1f}); sure: losses with p < {SIGNIFICANT}; one alone: with only the "
            "best head of the layer"
        )
        tables.append((title, ["layer", *heads, *WORTH], ablation_rows(found)))
        seed = result["runs"][0]["seed"]
        first = [run for run in result["runs"] if run["seed"] == seed]
        columns = ["plan", "BLEU", *KINDS, *roles_of(found)]
        title = "Heads that stay, by kind of attention and by their role in the dense model"
        tables.append((title, columns, stay_rows(found, first)))
    return tables


def render(result: dict, width: int = 100) -> str:
    """The whole study as text: the verdict, tables, then the findings."""
    lines: list[str] = []
    for verdict in result["verdicts"]:
        title = f"{verdict['title']}: " if len(result["verdicts"]) > 1 else ""
        lines += [*textwrap.wrap(title + verdict["sentence"], width), ""]
    for task in result["tasks"]:
        groups = grouped(result["summary"], task["name"])
        dense = next(e for e in groups[0][1] if e["method"] == "dense")
        rows: list[list[str] | str] = []
        for heading, entries in groups:
            rows.append(heading)
            for e in entries:
                row = cells(e, dense)
                rows.append(["  " + row[0], *row[1:]])
        header = [name for name, _ in columns(result["summary"])]
        lines += [
            f"{task['title']} ({task['train']:,} training, {task['validation']:,} validation, "
            f"{task['test']:,} test {task['examples']})",
            "",
            *_aligned(header, rows),
            "",
        ]
        domains = domain_columns([dense])
        if domains:
            rows = []
            for heading, entries in groups:
                rows.append(heading)
                for e in entries:
                    row = domain_cells(e)
                    rows.append(["  " + row[0], *row[1:]])
            lines += ["accuracy and share of heads (h) of each domain", ""]
            lines += [*_aligned(domains, rows), ""]
        for title, names, cells_of in attention_tables(result, task["name"]):
            lines += [*textwrap.wrap(title, width), "", *_aligned(names, cells_of), ""]
    lines += ["What was found", ""]
    for sentence in result["findings"]:
        lines += textwrap.wrap(sentence, width, initial_indent="- ", subsequent_indent="  ")
    lines += ["", "Columns: " + COLUMNS[0][0] + ", " + COLUMNS[0][1] + ";"]
    for name, meaning in columns(result["summary"])[1:]:
        lines.append(f"  {name}: {meaning}")
    return "\n".join(lines)
