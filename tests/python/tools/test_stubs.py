"""The types of the C++ core that are shipped are those of the compiled extension."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_the_stubs_are_those_of_the_extension():
    pytest.importorskip("pybind11_stubgen")
    check = subprocess.run(
        [sys.executable, ROOT / "tools" / "stubs.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr
