"""Writes python/headwise/_C.pyi, the types of the C++ core, from the compiled extension.

    stubs.py [--check]

With --check nothing is written, and the exit status says whether the file is as it would be.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "headwise"
STUB = PACKAGE / "_C.pyi"
HEADER = "# Written by `make stubs` from the compiled extension: not to be edited.\n"
#: pybind11 accepts anything that converts to a number; callers pass a number.
PLAINER = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"from __future__ import annotations\n", ""),
    (r"(?m)^(\w+: str) = .*$", r"\1"),  # a version
    (r"(def __eq__\(self, arg0: )\w+\)", r"\1object)"),
    # What the package gives them when it is imported (headwise.io.display.shown).
    (r"(?m)^class (HeadPlan|StructurePlan):", r"class \1(headwise.io.display.Shown):"),
    (r"(?m)^import typing$", "import typing\n\nimport headwise.io.display"),
    (r"(__hash__: typing.ClassVar\[None\] = None)", r"\1  # type: ignore[assignment]"),
)


def generated() -> str:
    """The stub of the installed extension."""
    import pybind11_stubgen
    import torch  # noqa: F401  the extension needs its libraries

    # Only the extension: the package would give its classes to the modules that show them.
    empty = importlib.machinery.ModuleSpec("headwise", None, is_package=True)
    empty.submodule_search_locations = [str(PACKAGE)]
    sys.modules["headwise"] = importlib.util.module_from_spec(empty)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["headwise._C", "--output-dir", folder, "--exit-code"]
        pybind11_stubgen.main(arguments)
        text = Path(folder, "headwise", "_C.pyi").read_text(encoding="utf-8")
    for pattern, plainer in PLAINER:
        text = re.sub(pattern, plainer, text)
    ruff = Path(sys.executable).with_name("ruff")
    return subprocess.run(
        [ruff, "format", "--stdin-filename", STUB, "-"],
        input=HEADER + text,
        text=True,
        check=True,
        capture_output=True,
    ).stdout


def main() -> int:
    text = generated()
    if "--check" in sys.argv[1:]:
        if STUB.exists() and STUB.read_text(encoding="utf-8") == text:
            return 0
        print(f"{STUB.relative_to(ROOT)} is not as the extension has it: run `make stubs`")
        return 1
    STUB.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
