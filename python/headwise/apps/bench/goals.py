"""What the times should be, as ratios to a yardstick; results say whether they are."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.apps.bench.contenders import Shape


@dataclass(frozen=True)
class Goal:
    """A ratio that should not be exceeded."""

    name: str
    limit: float

    def judge(self, value: float) -> dict:
        return {"name": self.name, "limit": self.limit, "met": value <= self.limit}


def layer_goal(shape: Shape, heads: int, training: bool) -> Goal:
    """For ``heads`` of a layer's heads, gate included."""
    if training:
        return Goal("training step over the layer with as many heads", 1.10)
    if heads == shape.heads:
        return Goal("forward of all heads over PyTorch's dense layer", 1.02)
    # There is little to compute beside gate and call.
    small = shape.batch == 1 or shape.length <= 32
    name = "forward over the layer with as many heads"
    return Goal(f"{name}, one or short sequences" if small else name, 1.15 if small else 1.05)


def mixed_goal() -> Goal:
    return Goal("budgets that differ within the batch over as many heads in total", 1.10)


def memory_goal() -> Goal:
    return Goal("peak memory of half of the heads over the dense layer", 0.75)


def gate_goal() -> Goal:
    """For sequences of 128 tokens and more."""
    return Goal("gate over the dense layer", 0.02)


def entropy_goal() -> Goal:
    return Goal("attention_entropy over scaled_dot_product_attention", 1.5)


def entropy_memory_goal() -> Goal:
    """Linear in the length: twice the length takes twice the memory, four times with a map."""
    return Goal("memory of attention_entropy at twice the length", 2.5)


def model_goal() -> Goal:
    return Goal("model with gates over the pruned model of as many heads", 1.05)
