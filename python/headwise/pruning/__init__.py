"""Scores of heads, plans of what stays, and pruning models by them."""

from headwise.pruning.alpha import AlphaSearch, select_alpha
from headwise.pruning.path import pruning_path
from headwise.pruning.plan import HeadPlan, LayerPlan, plan
from headwise.pruning.prune import mask, plan_from_gates, prune, unmask
from headwise.pruning.scores import HeadScores, hies, score_heads

__all__ = [
    "AlphaSearch",
    "HeadPlan",
    "HeadScores",
    "LayerPlan",
    "hies",
    "mask",
    "plan",
    "plan_from_gates",
    "prune",
    "pruning_path",
    "score_heads",
    "select_alpha",
    "unmask",
]
