"""Who may import whom: packages in one order, modules without circles, tests through support/."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import headwise as hw
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "headwise"
#: A package imports only from those before it.
ORDER = "io gates nn convert pruning serialization analysis explain testing apps".split()
COMPILED = {"headwise._C", "headwise._build_info"}


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The modules of headwise that a file imports: in functions and for type checking, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES or full in COMPILED else node.module)
    return {name for name in found if name.split(".")[0] == "headwise"} - COMPILED


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_top_level_holds_packages():
    modules = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"}
    assert modules - {"_build_info.py"} == {"__init__.py", "__main__.py", "_load.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_packages_import_only_what_stands_before_them(name):
    allowed = set(ORDER[: ORDER.index(name) + 1])
    if name == "apps":  # programs use the library like any user: import headwise as hw
        allowed.add("")
    wrong = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if package(module) == name and package(other) not in allowed
    }
    assert not wrong


def test_the_library_imports_no_program():
    code = "import headwise, sys; print([m for m in sys.modules if m.startswith('headwise.apps')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.stdout.strip() == "[]"


def test_no_modules_import_each_other_in_a_circle():
    left = {name: others - {name, "headwise"} for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in ORDER)])
def test_public_names_exist_and_are_sorted(name):
    module = importlib.import_module(f"headwise{name}")
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(set(names))
    assert not [name for name in names if not hasattr(module, name)]


@pytest.mark.parametrize("module", [name for name in MODULES if package(name) not in ("", "apps")])
def test_no_module_has_the_name_of_what_its_package_exports(module):
    """To a type checker, ``package.name`` would be the module."""
    parent, _, name = module.rpartition(".")
    assert parent == "headwise" or name not in importlib.import_module(parent).__all__


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (module := ".".join(parts[:length])) in MODULES:
            value = importlib.import_module(module)
            for attribute in parts[length:]:
                value = getattr(value, attribute, None)
            return value is not None
    return False


REFERENCE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(headwise\.[\w.]+)`")


def test_docstrings_refer_to_what_exists():
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in MODULES.values()
        for name in REFERENCE.findall(path.read_text(encoding="utf-8"))
        if not found(name)
    }
    assert not wrong


def test_sources_mirror_the_public_headers():
    names = {path.stem for path in (ROOT / "include" / "headwise").glob("*.h")}
    names -= {"headwise"}  # includes the others
    names -= {"gate_options"}  # in src/gates
    missing = [
        name
        for name in sorted(names)
        if not (ROOT / "src" / f"{name}.cpp").exists() and not (ROOT / "src" / name).is_dir()
    ]
    assert not missing


OPERATORS = ROOT / "src" / "ops"
#: What has kernels, by stem, and the folders of src/ops that have one for it.
STEMS = {
    "layer": {"cpu", "cuda", "aten", "meta", "autograd"},
    "core": {"cpu", "cuda", "aten", "meta", "autograd"},
    "projection": {"cpu", "aten", "meta", "autograd"},
    "select_heads": {"cpu", "cuda", "meta"},
    "attention_statistics": {"cpu", "cuda", "meta"},
    "budget_gate": {"cpu", "cuda", "meta"},
}


def test_an_operator_has_one_stem_in_every_folder():
    folders = ("cpu", "cuda", "aten", "meta", "autograd")
    assert {
        stem: {name for name in folders if (OPERATORS / name / f"{stem}.cpp").exists()}
        for stem in STEMS
    } == STEMS


def test_the_names_of_daily_work_are_few():
    assert len(hw.__all__) <= 54
    for name in ("convert", "explain"):  # functions, of the same names as their packages
        assert getattr(hw, name) is getattr(importlib.import_module(f"headwise.{name}"), name)


def test_test_modules_do_not_import_each_other():
    folder = Path(__file__).parent
    tests = {path.stem for path in folder.rglob("test_*.py")}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not {part for name in names for part in name.split(".")} & tests, path
