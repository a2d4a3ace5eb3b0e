"""Every input chooses how many attention heads run, and which; the others cost nothing."""

import torch  # noqa: F401  (LibTorch must be loaded before the extension)

from headwise import _C  # noqa: F401  (registers torch.ops.headwise.*)
from headwise.gates import FixedGate, Gate, RandomGate, anneal, gate_from_config, penalty
from headwise.multihead_attention import MultiheadAttention
from headwise.selection import Selection, select_all, select_heads

__all__ = [
    "FixedGate",
    "Gate",
    "MultiheadAttention",
    "RandomGate",
    "Selection",
    "anneal",
    "gate_from_config",
    "penalty",
    "select_all",
    "select_heads",
]
