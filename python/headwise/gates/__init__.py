"""Gates: modules that turn a layer's input into a selection of heads."""

from headwise.gates.base import Gate, anneal, gate_from_config, penalty
from headwise.gates.budget import BudgetGate
from headwise.gates.fixed import FixedGate
from headwise.gates.hard_concrete import HardConcreteGate
from headwise.gates.random import RandomGate
from headwise.gates.start import start_gates

__all__ = [
    "BudgetGate",
    "FixedGate",
    "Gate",
    "HardConcreteGate",
    "RandomGate",
    "anneal",
    "gate_from_config",
    "penalty",
    "start_gates",
]
