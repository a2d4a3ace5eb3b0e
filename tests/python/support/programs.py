"""The programs that tests/cpp builds."""

from __future__ import annotations

import os
from pathlib import Path


def find_program(name: str) -> Path | None:
    """In HEADWISE_BUILD_DIR, or in the newest build folder that has it."""
    root = Path(__file__).resolve().parents[3]
    folder = os.environ.get("HEADWISE_BUILD_DIR")
    folders = [Path(folder)] if folder else [root / "build", *sorted(root.glob("build*"))]
    found = [path for f in folders if (path := f / "tests" / "cpp" / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
