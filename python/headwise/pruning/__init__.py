"""Head scores, plans, and pruning models by plans."""

from headwise.pruning.alpha import AlphaSearch, select_alpha
from headwise.pruning.apply import mask, plan_from_gates, plan_from_use, prune, unmask
from headwise.pruning.bank import (
    Bank,
    PlanChoice,
    fit_bank,
    following,
    plan_choices,
    refit_router,
)
from headwise.pruning.compensation import LayerCompensation, compensate
from headwise.pruning.divergence import divergence_scores
from headwise.pruning.fitted_gates import GateFit, fit_gates
from headwise.pruning.head_masks import HeadMask, head_mask, plan_from_mask, prune_heads
from headwise.pruning.measured_headroom import Headroom, HeadroomRow, headroom
from headwise.pruning.path import pruning_path
from headwise.pruning.plans import HeadPlan, LayerPlan, plan
from headwise.pruning.reconstruction import LayerRepair, repair
from headwise.pruning.removal import repair_scores
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
    "Bank",
    "BlockPlan",
    "CoFi",
    "FfnPlan",
    "GateFit",
    "HeadMask",
    "HeadPlan",
    "HeadScores",
    "Headroom",
    "HeadroomRow",
    "HiddenPlan",
    "KwonResult",
    "LatencyTable",
    "LayerCompensation",
    "LayerPlan",
    "LayerRepair",
    "PlanChoice",
    "Structure",
    "StructurePlan",
    "compensate",
    "divergence_scores",
    "fisher_scores",
    "fit_bank",
    "fit_gates",
    "following",
    "head_mask",
    "headroom",
    "hies",
    "kwon_prune",
    "mask",
    "measure_latency",
    "plan",
    "plan_choices",
    "plan_from_gates",
    "plan_from_mask",
    "plan_from_use",
    "prune",
    "prune_heads",
    "pruning_path",
    "refit_router",
    "repair",
    "repair_scores",
    "score_heads",
    "select_alpha",
    "structure",
    "unmask",
]
