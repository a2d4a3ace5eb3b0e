"""What the heads of a trained model do: ablation, interactions, LRP, causal gates, confidence."""

from headwise.analysis.ablation import Ablation, ablate_heads, keep_one_head
from headwise.analysis.agreement import Agreement, score_agreement
from headwise.analysis.bootstrap import MetricDifference, metric_difference
from headwise.analysis.calibrate import calibrate_threshold
from headwise.analysis.causal import CausalHeads, causal_heads
from headwise.analysis.confidence import ConfidencePolicy, FittedPolicy, StagedPrediction
from headwise.analysis.interaction import (
    HeadInteractions,
    HeadSimilarity,
    head_interactions,
    head_similarity,
)
from headwise.analysis.lrp import LrpScores, lrp_scores

__all__ = [
    "Ablation",
    "Agreement",
    "CausalHeads",
    "ConfidencePolicy",
    "FittedPolicy",
    "HeadInteractions",
    "HeadSimilarity",
    "LrpScores",
    "MetricDifference",
    "StagedPrediction",
    "ablate_heads",
    "calibrate_threshold",
    "causal_heads",
    "head_interactions",
    "head_similarity",
    "keep_one_head",
    "lrp_scores",
    "metric_difference",
    "score_agreement",
]
