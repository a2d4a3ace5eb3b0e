"""Every input chooses how many attention heads run, and which; the others cost nothing."""

from headwise import _load  # first: it registers torch.ops.headwise.*
from headwise.convert import convert
from headwise.gates import (
    BudgetGate,
    FixedGate,
    Gate,
    HardConcreteGate,
    RandomGate,
    anneal,
    gate_from_config,
    penalty,
    start_gates,
)
from headwise.importance import HeadScores, hies, score_heads
from headwise.layers import attention_layers
from headwise.multihead_attention import MultiheadAttention
from headwise.plan import HeadPlan, LayerPlan, plan
from headwise.pruning import mask, prune
from headwise.selection import Selection, select_all, select_heads
from headwise.serialization import load, save
from headwise.trace import Trace, trace
from headwise.weights import load_safetensors, read_safetensors_metadata, save_safetensors

__all__ = [
    "BudgetGate",
    "FixedGate",
    "Gate",
    "HardConcreteGate",
    "HeadPlan",
    "HeadScores",
    "LayerPlan",
    "MultiheadAttention",
    "RandomGate",
    "Selection",
    "Trace",
    "anneal",
    "attention_layers",
    "backends",
    "convert",
    "gate_from_config",
    "hies",
    "load",
    "load_safetensors",
    "mask",
    "penalty",
    "plan",
    "prune",
    "read_safetensors_metadata",
    "save",
    "save_safetensors",
    "score_heads",
    "select_all",
    "select_heads",
    "start_gates",
    "trace",
]

__version__ = _load.core.__version__
backends = _load.core.backends
