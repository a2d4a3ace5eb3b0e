"""Writing a study down: results.json, index.html, the figures, and the table for the terminal."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from headwise.apps.compare import findings, table
from headwise.apps.compare.figures import DRAWINGS, save_png, svg
from headwise.apps.compare.store import write_json, write_text


def complete(result: dict) -> dict:
    """What :meth:`Study.run` returned, with ``summary``, ``comparisons`` and ``findings``."""
    result = dict(result)
    result["summary"] = findings.summarise(result["runs"])
    result["comparisons"] = findings.compare(result["runs"], result["summary"])
    result["findings"] = findings.sentences(result)
    return result


def public(result: dict) -> dict:
    """The content of results.json: without the single answers, which the run files keep."""
    runs = [{k: v for k, v in run.items() if k != "correct"} for run in result["runs"]]
    order = ("environment", "runs", "findings", "summary", "comparisons", "headroom")
    order += ("break_even", "tasks", "model", "settings")
    shown = {**result, "runs": runs}
    return {key: shown[key] for key in order if key in shown}


def page(result: dict) -> str:
    """index.html: one file, nothing loaded from elsewhere, every text escaped."""
    environment = Environment(
        loader=PackageLoader("headwise.apps.compare", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    tasks = []
    for task in result["tasks"]:
        groups = table.grouped(result["summary"], task["name"])
        dense = next(e for e in groups[0][1] if e["method"] == "dense")
        rows = [
            (heading, [{"kind": e["kind"], "cells": table.cells(e, dense)} for e in entries])
            for heading, entries in groups
        ]
        domains = table.domain_columns([dense])
        by_domain = [
            (
                heading,
                [{"kind": e["kind"], "cells": table.domain_cells(e)} for e in entries],
            )
            for heading, entries in groups
            if domains
        ]
        tasks.append({**task, "groups": rows, "domains": domains, "by_domain": by_domain})
    first = result["runs"][0]
    return environment.get_template("page.html.j2").render(
        model=first["model"],
        heads=result["model"]["heads"],
        layers=result["model"]["layers"],
        runs=len(result["runs"]),
        seeds=result["environment"]["seeds"],
        steps=result["settings"]["steps"],
        findings=result["findings"],
        headroom=result["headroom"],
        tasks=tasks,
        columns=table.COLUMNS,
        # The drawings are made here and hold no text but what matplotlib has escaped.
        drawings=[
            {"title": d.title, "caption": d.caption, "svg": Markup(svg(d, result))}
            for d in DRAWINGS
        ],
        environment=result["environment"],
    )


def write(result: dict, out: Path) -> list[Path]:
    """Writes a completed result to the folder ``out``; returns the files.

    Raises:
        OSError: the folder cannot be written to.
    """
    files = [out / "results.json", out / "index.html"]
    write_json(files[0], public(result))
    write_text(files[1], page(result))
    for drawing in DRAWINGS:
        files.append(out / f"{drawing.name}.png")
        save_png(drawing, result, files[-1])
    return files
