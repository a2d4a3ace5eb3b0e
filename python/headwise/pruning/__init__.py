"""Scores of heads, plans of what stays, and pruning models by them."""

from headwise.pruning.alpha import AlphaSearch, select_alpha
from headwise.pruning.apply import mask, plan_from_gates, prune, unmask
from headwise.pruning.path import pruning_path
from headwise.pruning.plans import HeadPlan, LayerPlan, plan
from headwise.pruning.scores import HeadScores, hies, score_heads
from headwise.pruning.structured import (
    BlockPlan,
    CoFi,
    FfnPlan,
    HiddenPlan,
    KwonResult,
    LatencyTable,
    Structure,
    StructurePlan,
    fisher_scores,
    kwon_prune,
    measure_latency,
    structure,
)

__all__ = [
    "AlphaSearch",
    "BlockPlan",
    "CoFi",
    "FfnPlan",
    "HeadPlan",
    "HeadScores",
    "HiddenPlan",
    "KwonResult",
    "LatencyTable",
    "LayerPlan",
    "Structure",
    "StructurePlan",
    "fisher_scores",
    "hies",
    "kwon_prune",
    "mask",
    "measure_latency",
    "plan",
    "plan_from_gates",
    "prune",
    "pruning_path",
    "score_heads",
    "select_alpha",
    "structure",
    "unmask",
]
