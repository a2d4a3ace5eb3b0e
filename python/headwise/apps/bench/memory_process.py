"""The process in which :func:`headwise.apps.bench.memory.peaks` measures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from headwise.apps.bench import entropy, layer
from headwise.apps.bench.contenders import Shape
from headwise.apps.bench.memory import call_bytes


def main(task: dict) -> dict[str, dict[str, int]]:
    """For each contender of ``task`` its ``call_bytes``; see ``peaks`` for the content of a
    task."""
    builders: dict[str, Callable[..., dict]] = {
        "layer": layer.memory_runs,
        "entropy": entropy.memory_runs,
    }
    torch.set_num_threads(task.pop("threads"))
    what, names = task.pop("what"), task.pop("names")
    shape, dtype = Shape(*task.pop("shape")), getattr(torch, task.pop("dtype"))
    runs = builders[what](shape, dtype, **task)
    return {name: {"call_bytes": call_bytes(runs[name])} for name in names}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
