"""Writing a study: results.json, index.html, the figures, and the table for the terminal."""

from __future__ import annotations

from pathlib import Path

from headwise.apps.compare import findings
from headwise.apps.compare.figures import drawings, save_png
from headwise.apps.compare.verdict import verdicts
from headwise.apps.pages.page import write_page
from headwise.io.files import write_json


def complete(result: dict) -> dict:
    """What :meth:`Study.run` returned, with ``summary``, ``comparisons``, ``verdicts`` and
    ``findings``."""
    result = dict(result)
    result["summary"] = findings.summarise(result["runs"])
    result["comparisons"] = findings.compare(result["runs"], result["summary"])
    result["verdicts"] = verdicts(result)
    result["findings"] = findings.sentences(result)
    return result


def public(result: dict) -> dict:
    """The content of results.json: without the single answers, which are in the run files."""
    runs = [{k: v for k, v in run.items() if k != "correct"} for run in result["runs"]]
    for run in runs:
        if "metric" in run:
            run["metric"] = {k: run["metric"][k] for k in ("name", "value", "validation")}
    order = ["environment", "runs", "verdicts", "findings", "summary", "comparisons"]
    order += ["headroom", "attention", "tasks", "model", "settings"]
    shown = {**result, "runs": runs}
    return {key: shown[key] for key in order if key in shown}


def write(result: dict, out: Path) -> list[Path]:
    """Writes a completed result to the folder ``out``; returns the files.

    Raises:
        OSError: the folder cannot be written to.
    """
    files = [out / "results.json", out / "index.html"]
    write_json(files[0], public(result))
    write_page(files[1], public(result))
    for drawing in drawings(result):
        files.append(out / f"{drawing.name}.png")
        save_png(drawing, result, files[-1])
    return files
