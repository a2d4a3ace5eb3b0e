"""The CUDA kernels on an emulated device, where tests/cpp is built."""

import os
from pathlib import Path

import headwise  # noqa: F401  (registers torch.ops.headwise)
import torch

from support.executors import Executors


def find_library():
    """What tests/cpp builds, in HEADWISE_BUILD_DIR or the newest build folder."""
    root = Path(__file__).resolve().parents[3]
    folder = os.environ.get("HEADWISE_BUILD_DIR")
    folders = [Path(folder)] if folder else [root / "build", *sorted(root.glob("build*"))]
    found = [p for f in folders if (p := f / "tests" / "cpp" / "libheadwise_emulated.so").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


LIBRARY = find_library()
EMULATED = None
if LIBRARY:
    torch.ops.load_library(str(LIBRARY))
    EMULATED = Executors(torch.ops.headwise_emulated)
