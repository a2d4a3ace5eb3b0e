"""Every gate, and what every selection must hold."""

import headwise as hw
import torch
from headwise.testing import check_selection

D, H = 16, 6
EVERY_GATE = [
    hw.FixedGate([0, 2]),
    hw.RandomGate(0.5),
    hw.RandomGate(0.4, per_input=False),
    hw.BudgetGate(),
    hw.BudgetGate(budget=0.5, relaxation="straight_through", noise="normal", kept_weight="soft"),
    hw.HardConcreteGate(),
    hw.HardConcreteGate(input_dependent=True, penalty="lagrangian"),
    hw.HardConcreteGate(input_dependent=True, kept_weight="one", penalty="l0"),
    hw.SubsetGate(2),
    hw.SubsetGate(keep=0.4, scope="layer", estimator="straight_through"),
    hw.RequestedBudgetGate(0.3),
    hw.GumbelSigmoidGate(0.3),
    hw.SleepGate(0.5),
    hw.SharedHeadsGate(hw.BudgetGate(0.3), shared=[1, 4]),
    hw.MixtureOfHeadsGate(0.7, shared=[1, 4], routing="sequence"),
]


def lively(gate, scale=2.0):
    """A bound gate with random parameters, so that inputs differ."""
    bound = hw.link_gates(gate.bind(D, H))
    with torch.no_grad():
        for parameter in bound.parameters():
            parameter.normal_(0.0, scale)
    return bound


def assert_consistent(selection, batch):
    check_selection(selection, batch, H)
