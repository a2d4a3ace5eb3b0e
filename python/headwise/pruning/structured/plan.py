"""Plans for the structure of a model: heads, neurons, blocks and hidden dimensions."""

from __future__ import annotations

from typing import Any

from headwise._C import BlockPlan, FfnPlan, HiddenPlan, StructurePlan
from headwise.io.display import Grid, shown, table_html
from headwise.pruning.plans import loads_files, plan_grid

__all__ = ["BlockPlan", "FfnPlan", "HiddenPlan", "StructurePlan"]

for _type in (BlockPlan, FfnPlan, HiddenPlan, StructurePlan):
    _type.__module__ = __name__  # where pickle finds it


def _records(plan: StructurePlan) -> list[dict[str, Any]]:
    """What the plan keeps of each part."""
    found = [("heads", own.name, len(own.heads), own.num_heads) for own in plan.heads.layers]
    found += [("neurons", own.name, len(own.neurons), own.num_neurons) for own in plan.ffn]
    found += [("block", own.name, int(own.scale != 0.0), 1) for own in plan.blocks]
    if plan.hidden is not None:
        found.append(("dimensions", "", len(plan.hidden.dimensions), plan.hidden.size))
    return [dict(zip(("part", "name", "kept", "of"), row, strict=True)) for row in found]


def _grid(plan: StructurePlan) -> Grid:
    return plan_grid(plan.heads)


loads_files(StructurePlan)
shown(StructurePlan, _records, _grid, html=lambda plan: table_html(_records(plan)))
