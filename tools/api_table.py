"""Writes docs/api.md: which public name exists in Python and which in C++.

    .venv/bin/python tools/api_table.py

Python's names are those of ``headwise.__all__`` and of its packages' ``__all__``; C++'s are what
include/headwise declares; operators are those of ``torch.ops.headwise`` that a header declares too.
"""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import headwise as hw
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
#: Packages whose names are applications, not the library's.
_APPLICATIONS = {"apps"}
_HEAD = """# Which name exists in which language

Written by `tools/api_table.py`; a test fails when it is out of date. A name does the same thing in
both languages, with the same numbers; its signature follows the language. Classes of options
(`BudgetGateOptions`) belong to their class and are not listed. `hw.convert` and `hw.explain` are
functions: import names written `headwise.explain.X` with `from headwise.explain import X`.

"""


def python_names() -> dict[str, str]:
    """Name -> its shortest path: ``hw.prune`` or ``hw.analysis.lrp``."""
    found = {name: f"hw.{name}" for name in hw.__all__ if not ismodule(getattr(hw, name))}
    for module in pkgutil.iter_modules(hw.__path__):
        if not module.ispkg or module.name.startswith("_") or module.name in _APPLICATIONS:
            continue
        package = import_module(f"headwise.{module.name}")
        # hw.convert and hw.explain are functions: their packages have to be imported.
        way = "hw" if getattr(hw, module.name, None) is package else "headwise"
        for name in getattr(package, "__all__", ()):
            found.setdefault(name, f"{way}.{module.name}.{name}")
    return found


def cpp_names() -> dict[str, str]:
    """Name -> the header that declares it."""
    found: dict[str, str] = {}
    for header in sorted((ROOT / "include" / "headwise").rglob("*.h")):
        text = re.sub(r"//[^\n]*", "", header.read_text(encoding="utf-8"))
        classes = re.findall(
            r"^(?:class|struct|enum class)\s+(?:HEADWISE_API\s+)?(\w+)[^;]*?\{", text, re.M
        )
        functions = re.findall(r"^HEADWISE_API\s[^;{(]*?\b(\w+)\(", text, re.M)
        for name in (*classes, *functions):
            if not name.endswith("Options"):
                found.setdefault(name.removesuffix("Impl"), header.name)
    return found


def page() -> str:
    """The text of docs/api.md."""
    python, cpp = python_names(), cpp_names()
    operators = {
        name.removeprefix("headwise::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("headwise::")
    }
    both, only_python, operator_rows, only_cpp = [], [], [], []
    for name in sorted({*python, *cpp}, key=lambda name: (name.lower(), name)):
        here, there = python.get(name), cpp.get(name)
        if here and there:
            both.append(f"| `{here}` | `headwise::{name}` | `{there}` |")
        elif here:
            only_python.append(f"`{here}`")
        elif name in operators:
            operator_rows.append(
                f"| `torch.ops.headwise.{name}` | `headwise::{name}` | `{there}` |"
            )
        else:
            only_cpp.append(f"| `headwise::{name}` | `{there}` |")
    columns = "| Python | C++ | header |\n|---|---|---|\n"
    return (
        _HEAD
        + f"## In both ({len(both)})\n\n{columns}"
        + "\n".join(both)
        + f"\n\n## Operators in both ({len(operator_rows)})\n\n{columns}"
        + "\n".join(operator_rows)
        + f"\n\n## In Python alone ({len(only_python)})\n\n"
        + ", ".join(only_python)
        + f"\n\n## In C++ alone ({len(only_cpp)})\n\n| C++ | header |\n|---|---|\n"
        + "\n".join(only_cpp)
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
