"""Gates: modules that turn a layer's input into a selection of heads."""

from headwise.gates.bank import BankGate
from headwise.gates.base import Gate, gate_from_config
from headwise.gates.budget import BudgetGate
from headwise.gates.fixed import FixedGate
from headwise.gates.group import GroupGate
from headwise.gates.gumbel_sigmoid import GumbelSigmoidGate
from headwise.gates.hard_concrete import HardConcreteGate
from headwise.gates.mixture import MixtureOfHeadsGate
from headwise.gates.model import anneal, link_gates, penalty
from headwise.gates.optimizing import parameter_groups
from headwise.gates.random import RandomGate
from headwise.gates.requested import RequestedBudgetGate, request_budget
from headwise.gates.selection import Selection, TokenSelection, select_all, select_heads
from headwise.gates.shared_heads import SharedHeadsGate
from headwise.gates.sleep import HeadMove, SleepGate, head_moves
from headwise.gates.start import start_gates
from headwise.gates.subset import SubsetGate
from headwise.gates.threshold import ThresholdGate

__all__ = [
    "BankGate",
    "BudgetGate",
    "FixedGate",
    "Gate",
    "GroupGate",
    "GumbelSigmoidGate",
    "HardConcreteGate",
    "HeadMove",
    "MixtureOfHeadsGate",
    "RandomGate",
    "RequestedBudgetGate",
    "Selection",
    "SharedHeadsGate",
    "SleepGate",
    "SubsetGate",
    "ThresholdGate",
    "TokenSelection",
    "anneal",
    "gate_from_config",
    "head_moves",
    "link_gates",
    "parameter_groups",
    "penalty",
    "request_budget",
    "select_all",
    "select_heads",
    "start_gates",
]
