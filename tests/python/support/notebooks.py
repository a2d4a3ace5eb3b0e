"""Runs notebooks without Jupyter: code cells in order, in one namespace.

    PYTHONPATH=python:tests/python python -m support.notebooks examples/notebooks/*.ipynb

stores what the cells print and show. A cell shows the value of its last line, as in Jupyter: as
text, and as HTML if the value has ``_repr_html_``. No magics, no pictures.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def execute(notebook: dict[str, Any], name: str) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, in the notebook format; an exception ends the run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(codes, 1):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        value, printed = None, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"{name}, cell {count}", "exec"), namespace)
            if isinstance(last, ast.Expr):
                code = compile(ast.Expression(last.value), f"{name}, cell {count}", "eval")
                value = eval(code, namespace)
        outputs.append(_outputs(printed.getvalue(), value, count))
    return outputs


def _outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    own: list[dict[str, Any]] = []
    if printed:
        own.append({"name": "stdout", "output_type": "stream", "text": _lines(printed)})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        shown = {"data": data, "execution_count": count, "metadata": {}}
        own.append({**shown, "output_type": "execute_result"})
    return own


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def store(path: Path) -> None:
    """Runs the notebook at ``path`` and writes its outputs into it."""
    notebook = read(path)
    outputs = iter(execute(notebook, path.name))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(codes, 1):
        cell.update(execution_count=count, outputs=next(outputs))
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.path.insert(0, str(Path(argument).resolve().parent))
        store(Path(argument))
