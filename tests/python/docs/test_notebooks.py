"""The notebooks run from top to bottom, show what is stored in them, and are listed in the docs."""

import re
import sys
from pathlib import Path

import pytest
from support.notebooks import execute, read

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 60_000


def codes(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(outputs):
    """What a cell prints, without its numbers, which differ a little between machines."""
    text = "".join("".join(own["text"]) for own in outputs if own["output_type"] == "stream")
    return re.sub(r"-?\d+(\.\d+)?", "#", text)


def shown(outputs):
    return [sorted(own["data"]) for own in outputs if own["output_type"] == "execute_result"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.delitem(sys.modules, "small_task", raising=False)
    notebook = read(path)
    found = execute(notebook, path.name)
    assert len(found) == len(codes(notebook)) >= 3
    for cell, outputs in zip(codes(notebook), found, strict=True):
        where = f"{path.name}, cell {cell['execution_count']}"
        assert printed(outputs) == printed(cell["outputs"]), where
        assert shown(outputs) == shown(cell["outputs"]), where


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_open_with_what_you_get(path):
    notebook = read(path)
    first = notebook["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n\nYou get\b", text)
    assert path.stat().st_size < MOST_BYTES
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", "".join(cell["source"])):
            assert (path.parent / target).exists() or cell["cell_type"] == "code", target


def test_the_docs_list_every_notebook():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        title = "".join(read(path)["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        assert f"[{title}](../examples/notebooks/{path.name})" in page
