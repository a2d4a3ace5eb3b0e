"""Every input chooses how many attention heads run, and which; the others cost nothing."""

from headwise import _load  # first: it registers torch.ops.headwise.*
from headwise.analysis.ablation import Ablation, ablate_heads, keep_one_head
from headwise.analysis.agreement import Agreement, score_agreement
from headwise.analysis.causal import CausalHeads, causal_heads
from headwise.analysis.confidence import ConfidencePolicy, FittedPolicy, StagedPrediction
from headwise.analysis.interaction import (
    HeadInteractions,
    HeadSimilarity,
    head_interactions,
    head_similarity,
)
from headwise.analysis.lrp import HeadRelevance, head_relevance
from headwise.apps.pages import write_page, write_pngs
from headwise.convert import convert
from headwise.explain import (
    AlignedPair,
    AnnotatedBatch,
    Explanation,
    RoleThresholds,
    Sentence,
    explain,
    explain_data,
    head_roles,
    parse_with_spacy,
    read_alignments,
    read_conllu,
)
from headwise.explain.head_log import HeadLog, log_heads
from headwise.explain.trace import Trace, trace
from headwise.gates import (
    BudgetGate,
    FixedGate,
    Gate,
    GroupGate,
    GumbelSigmoidGate,
    HardConcreteGate,
    HeadMove,
    RandomGate,
    RequestedBudgetGate,
    SharedHeadsGate,
    SleepGate,
    SubsetGate,
    ThresholdGate,
    anneal,
    calibrate_threshold,
    gate_from_config,
    head_moves,
    link_gates,
    penalty,
    request_budget,
    start_gates,
)
from headwise.gates.selection import Selection, select_all, select_heads
from headwise.io.safetensors_files import (
    load_safetensors,
    read_safetensors_metadata,
    save_safetensors,
)
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.key_value_cache import KeyValueCache
from headwise.nn.layers import attention_layers, head_groups
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.visibility import gates_see
from headwise.pruning.alpha import AlphaSearch, select_alpha
from headwise.pruning.path import pruning_path
from headwise.pruning.plan import HeadPlan, LayerPlan, plan
from headwise.pruning.prune import mask, plan_from_gates, prune, unmask
from headwise.pruning.scores import HeadScores, hies, score_heads
from headwise.pruning.structured.cofi import CoFi
from headwise.pruning.structured.description import Structure, structure
from headwise.pruning.structured.kwon import KwonResult, fisher_scores, kwon_prune
from headwise.pruning.structured.latency import LatencyTable, measure_latency
from headwise.pruning.structured.plan import BlockPlan, FfnPlan, HiddenPlan, StructurePlan
from headwise.serialization.save_load import load, save

__all__ = [
    "Ablation",
    "Agreement",
    "AlignedPair",
    "AlphaSearch",
    "AnnotatedBatch",
    "BlockPlan",
    "BudgetGate",
    "CausalHeads",
    "CoFi",
    "ConfidencePolicy",
    "Explanation",
    "FfnPlan",
    "FittedPolicy",
    "FixedGate",
    "Gate",
    "GroupGate",
    "GroupedQueryAttention",
    "GumbelSigmoidGate",
    "HardConcreteGate",
    "HeadInteractions",
    "HeadLog",
    "HeadMove",
    "HeadPlan",
    "HeadRelevance",
    "HeadScores",
    "HeadSimilarity",
    "HiddenPlan",
    "KeyValueCache",
    "KwonResult",
    "LatencyTable",
    "LayerPlan",
    "MultiheadAttention",
    "RandomGate",
    "RequestedBudgetGate",
    "RoleThresholds",
    "Selection",
    "Sentence",
    "SharedHeadsGate",
    "SleepGate",
    "StagedPrediction",
    "Structure",
    "StructurePlan",
    "SubsetGate",
    "ThresholdGate",
    "Trace",
    "ablate_heads",
    "anneal",
    "attention_layers",
    "backends",
    "calibrate_threshold",
    "causal_heads",
    "convert",
    "explain",
    "explain_data",
    "fisher_scores",
    "gate_from_config",
    "gates_see",
    "head_groups",
    "head_interactions",
    "head_moves",
    "head_relevance",
    "head_roles",
    "head_similarity",
    "hies",
    "keep_one_head",
    "kwon_prune",
    "link_gates",
    "load",
    "load_safetensors",
    "log_heads",
    "mask",
    "measure_latency",
    "parse_with_spacy",
    "penalty",
    "plan",
    "plan_from_gates",
    "prune",
    "pruning_path",
    "read_alignments",
    "read_conllu",
    "read_safetensors_metadata",
    "request_budget",
    "save",
    "save_safetensors",
    "score_agreement",
    "score_heads",
    "select_all",
    "select_alpha",
    "select_heads",
    "start_gates",
    "structure",
    "trace",
    "unmask",
    "write_page",
    "write_pngs",
]

__version__ = _load.core.__version__
backends = _load.core.backends
