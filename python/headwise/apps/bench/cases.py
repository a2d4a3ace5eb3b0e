"""The table of cases that the benchmarks in Python, C++ and on a GPU share, and their goals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from headwise.apps.bench.contenders import Shape

_TABLE = json.loads((files("headwise.apps.bench") / "cases.json").read_text(encoding="utf-8"))

SHAPES = tuple(Shape(*shape["sizes"]) for shape in _TABLE["shapes"])
FRACTIONS = tuple(_TABLE["fractions"])


@dataclass(frozen=True)
class Goal:
    """A ratio to a yardstick that should not be exceeded."""

    name: str
    limit: float

    def judge(self, value: float) -> dict:
        return {"name": self.name, "limit": self.limit, "met": value <= self.limit}


#: By what is measured. "gate" is for sequences of 128 tokens and more; "entropy memory" is linear
#: in the length: twice the length takes twice the memory, four times with all attention weights.
GOALS = {name: Goal(**goal) for name, goal in _TABLE["goals"].items()}


def layer_goal(shape: Shape, heads: int, training: bool) -> Goal:
    """For ``heads`` of a layer's heads, gate included."""
    if training:
        return GOALS["train"]
    if heads == shape.heads:
        return GOALS["dense"]
    # There is little to compute besides gate and call.
    least = _TABLE["small"]
    small = shape.batch <= least["batch"] or shape.length <= least["length"]
    return GOALS["small" if small else "layer"]
