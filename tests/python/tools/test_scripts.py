"""Scripts that no test runs as a whole: what they import from headwise exists."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path
    for folder in ("benchmarks", "examples", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_what_exists(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "headwise":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                inside = f"{node.module}.{name}"
                assert hasattr(module, name) or importlib.util.find_spec(inside), inside
