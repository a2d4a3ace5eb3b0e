"""Plans for the structure of a model: heads, neurons, blocks and hidden dimensions."""

from __future__ import annotations

from headwise._C import BlockPlan, FfnPlan, HiddenPlan, StructurePlan

__all__ = ["BlockPlan", "FfnPlan", "HiddenPlan", "StructurePlan"]

for _type in (BlockPlan, FfnPlan, HiddenPlan, StructurePlan):
    _type.__module__ = __name__  # where pickle finds it
