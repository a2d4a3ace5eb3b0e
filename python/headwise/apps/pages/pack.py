"""The documents as data of a page: small, and safe inside a script element."""

from __future__ import annotations

import base64
import json
import math
import zlib
from typing import Any

from headwise.apps.compare import table
from headwise.apps.compare.verdict import front, recommended
from headwise.apps.pages.documents import Documents
from headwise.explain.summary import summarise

#: Characters that a browser would treat as markup, or an old one as the end of a line, inside a
#: script.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&'\u2028\u2029"}


def script_json(value: Any) -> str:
    """JSON without ``< > & '`` and without JavaScript's additional line ends."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def pack_map(rows: list[list[float]]) -> str:
    """An attention map as text: 255 times the square root of each weight, deflated, in base 64.

    The square root leaves small weights their digits: the error of a weight w is below
    sqrt(w) / 255 + 1 / 255^2.
    """
    levels = bytes(
        round(255 * math.sqrt(min(max(weight or 0.0, 0.0), 1.0))) for row in rows for weight in row
    )
    return base64.b64encode(zlib.compress(levels, 9)).decode("ascii")


def pack(documents: Documents, room: int) -> tuple[dict[str, Any], list[str]]:
    """The data of the page's scripts, in at most ``room`` bytes, and notes about what was left out.

    Inputs are kept from the first; attention maps of the heads that matter most before others.

    Raises:
        ValueError: not even one input fits, or the data set or the comparison alone do not.
    """
    shown: dict[str, Any] = {"inputs": None, "use": None, "roles": None, "compared": None}
    notes: list[str] = []
    if documents.use is not None:
        shown["use"] = rounded({k: v for k, v in documents.use.items() if k != "settings"})
    elif documents.roles is not None:
        shown["roles"] = rounded(documents.roles)
    if documents.compared is not None:
        shown["compared"] = _compared(documents.compared)
    room -= size(shown)
    if documents.explanation is not None:
        shown["inputs"], left_out = _inputs(documents.explanation["inputs"], room)
        notes += left_out
    elif room < 0:
        raise ValueError(f"documents must be smaller: they need {-room:,} bytes more than there is")
    return shown, notes


def size(value: Any) -> int:
    """Bytes in the page."""
    return len(script_json(value).encode("utf-8", "replace"))


def rounded(value: Any) -> Any:
    """Numbers with four significant digits; what is not finite becomes null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): rounded(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(own) for own in value]
    return value


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    tasks = [{"name": task["name"], "title": task["title"]} for task in result["tasks"]]
    about = {**result["environment"], **result.get("settings", {})}
    facts = [[name.replace("_", " "), _told(value)] for name, value in about.items()]
    summary = [
        {
            **entry,
            "front": _on_front(entry, result["summary"]),
            "recommended": entry is recommended(result, entry["task"]),
        }
        for entry in result["summary"]
    ]
    return rounded({"summary": summary, "tasks": tasks, "tables": _tables(result), "facts": facts})


def _on_front(entry: dict[str, Any], summary: list[dict[str, Any]]) -> list[bool]:
    """For each shape of the latency, whether the entry is on its task's front."""
    own = [other for other in summary if other["task"] == entry["task"]]
    return [
        any(other is entry for other in front(own, shape)) for shape in range(len(entry["latency"]))
    ]


def _tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables that the terminal shows, each with the name of its task."""
    found = []
    for task in result["tasks"]:
        groups = table.grouped(result["summary"], task["name"])
        dense = next((e for e in groups[0][1] if e["method"] == "dense"), None)
        if dense is None:
            continue
        columns: list[list[Any]] = [["budget", "heads that a method may keep", "text"]]
        columns += [[name, meaning, None] for name, meaning in table.columns(result["summary"])]
        columns[1][2] = "text"
        parts = ("train", "validation", "test")
        size = ", ".join(f"{task[part]:,} {part}" for part in parts)
        found.append(
            {
                "task": task["name"],
                "title": f"All methods: {task['title']} ({size} {task.get('examples', 'texts')})",
                "columns": columns,
                "rows": [[group, *table.cells(e, dense)] for group, own in groups for e in own],
            }
        )
        if domains := table.domain_columns([dense]):
            found.append(
                {
                    "task": task["name"],
                    "title": "Accuracy and share of heads (h) of each domain",
                    "columns": [columns[0], *([name, None, None] for name in domains)],
                    "rows": [[group, *table.domain_cells(e)] for group, own in groups for e in own],
                }
            )
        for title, headings, rows in table.attention_tables(result, task["name"]):
            heading: list[list[Any]] = [[name, None, None] for name in headings]
            heading[0][2] = "text"
            found.append({"task": task["name"], "title": title, "columns": heading, "rows": rows})
    for room in result.get("headroom", []):
        names = ("keep", "static", "routed", "ceiling", "swapped")
        found.append(
            {
                "task": room["task"],
                "title": "Accuracy before any training: headroom",
                "columns": [
                    ["heads", "share that is kept", "text"],
                    ["one repaired plan", None, None],
                    ["routed by the input", None, None],
                    ["by the true cluster", None, None],
                    ["another input's plan", None, None],
                ],
                "rows": [[f"{100 * row[name]:.1f}%" for name in names] for row in room["rows"]],
            }
        )
    return found


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_told(own)}" for name, own in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list | tuple) else str(value)


def _inputs(inputs: list[dict[str, Any]], room: int) -> tuple[list[dict[str, Any]], list[str]]:
    kept: list[dict[str, Any]] = []
    maps: list[tuple[float, dict[str, Any], list[list[float]]]] = []
    for entry in inputs:
        entry = {**entry, "summary": summarise(entry), "layers": list(entry["layers"])}
        own = []
        for place, layer in enumerate(entry["layers"]):
            heads = []
            for head in layer["heads"]:
                heads.append(rounded({**head, "attention": None}))
                if head["attention"] is not None:
                    rank = abs(head["effect"] if head["effect"] is not None else 0.0)
                    own.append((rank + head["on"] * 1e-9, heads[-1], head["attention"]))
            entry["layers"][place] = {**rounded({**layer, "heads": None}), "heads": heads}
        needed = size(entry)
        if needed > room:
            break
        room -= needed
        kept.append(entry)
        maps += own
    if not kept:
        raise ValueError("documents must be smaller: not even the first input fits in the page")
    maps.sort(key=lambda one: -one[0])
    dropped = 0
    for _, head, attention in maps:
        packed = pack_map(attention)
        if len(packed) <= room:
            head["attention"] = packed
            room -= len(packed)
        else:
            head["left_out"] = True
            room -= len(',"left_out":true')
            dropped += 1
    notes = []
    if len(kept) < len(inputs):
        notes.append(
            f"The page shows the first {len(kept)} of {len(inputs)} inputs, to stay under its size "
            "limit; the JSON has them all."
        )
    if dropped:
        notes.append(
            f"{dropped} of {len(maps)} attention maps are left out, those of the heads with the "
            "smallest effects, to stay under the size limit; the JSON has them all."
        )
    return kept, notes
