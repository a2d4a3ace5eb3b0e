"""Every gate that learns finds the heads of a frozen model that are right by construction."""

import headwise as hw
import pytest
import torch
from support.planted import Planted, squared

# y = x0 + x1 + x3. Heads (0, 0) and (1, 0) have the same output: one is needed, both together do
# harm;
# (1, 1) and (0, 3) are needed; (0, 2) and (1, 3) only do harm; (0, 1) and (1, 2) do nothing.
WEIGHTS = ([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, -1.0])
RIGHT = [{(0, 0), (1, 1), (0, 3)}, {(1, 0), (1, 1), (0, 3)}]
KEEP = 3 / 8


def problem():
    x = torch.randn(64, 4, dtype=torch.float64)
    return x, x[:, 0] + x[:, 1] + x[:, 3]


def gated(gate):
    model = Planted(*WEIGHTS).requires_grad_(False)
    for layer in model.layers:
        layer.set_gate(gate.bind(4, 4, dtype=torch.float64))
    hw.link_gates(model)
    return model


def train(model, steps=150, rate=0.08):
    gates = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(gates, rate)
    model.train()
    for step in range(steps):
        hw.anneal(model, step / (steps - 1))
        loss = squared(model, problem()).mean() + hw.penalty(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def chosen(model):
    """The heads that each of 64 inputs ran."""
    x, y = problem()
    with torch.no_grad(), hw.trace(model) as trace:
        loss = (model(x) - y).square().mean().item()
    weight = torch.stack([s.weight for s in trace.selections.values()], 1)  # [B, layers, H]
    return [{tuple(head) for head in row.nonzero().tolist()} for row in weight], loss


GATES = {
    "hard concrete": hw.HardConcreteGate(KEEP),
    "hard concrete, l0": hw.HardConcreteGate(penalty="l0", strength=0.05),
    "hard concrete, lagrangian": hw.HardConcreteGate(
        KEEP, penalty="lagrangian", strength=1.0, warmup=0.1
    ),
    "hard concrete, by the input": hw.HardConcreteGate(
        KEEP, input_dependent=True, kept_weight="one", static_until=1.0, hard_from=0.0
    ),
    "subset": hw.SubsetGate(3, temperature=1.0),
    "subset, straight through": hw.SubsetGate(3, estimator="straight_through"),
    "budget": hw.BudgetGate(KEEP, static_until=1.0),
    "budget, straight through": hw.BudgetGate(
        KEEP, static_until=1.0, relaxation="straight_through"
    ),
    "adavit": hw.GumbelSigmoidGate(KEEP, temperature=1.0, static_until=1.0),
}


@pytest.mark.parametrize("name", GATES)
def test_the_right_heads_are_found(name):
    torch.manual_seed(0)
    # Two heads with the same output share the work at first: both gates are half open.
    model = train(gated(GATES[name]), steps=300 if "l0" in name else 150)
    found, loss = chosen(model)
    assert all(heads in RIGHT for heads in found), found[0]
    assert loss < 0.05


def test_a_model_of_any_cost_puts_the_right_heads_first():
    torch.manual_seed(0)
    model = train(gated(hw.RequestedBudgetGate(min_budget=KEEP, max_budget=KEEP)), steps=300)
    hw.request_budget(model, KEEP)
    found, _ = chosen(model)
    assert sum(heads in RIGHT for heads in found) > 0.9 * len(found)
