"""Structured pruning: heads, feed-forward neurons, blocks and dimensions of the residual stream."""

from headwise.pruning.structured.cofi import CoFi
from headwise.pruning.structured.description import Structure, structure
from headwise.pruning.structured.kwon import KwonResult, fisher_scores, kwon_prune
from headwise.pruning.structured.latency import LatencyTable, measure_latency
from headwise.pruning.structured.plan import BlockPlan, FfnPlan, HiddenPlan, StructurePlan

__all__ = [
    "BlockPlan",
    "CoFi",
    "FfnPlan",
    "HiddenPlan",
    "KwonResult",
    "LatencyTable",
    "Structure",
    "StructurePlan",
    "fisher_scores",
    "kwon_prune",
    "measure_latency",
    "structure",
]
