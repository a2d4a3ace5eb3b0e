"""Everything that a gate needs is in its state."""

import copy
import pickle

import headwise as hw
import pytest
import torch
from support.gates import EVERY_GATE, D, H, lively
from torch import nn

GATES = [*EVERY_GATE, hw.GroupGate(hw.BudgetGate()), hw.GroupGate(hw.SubsetGate(2))]


def layer_of(gate, device=None):
    return hw.link_gates(
        hw.MultiheadAttention(D, H, head_dim=4, gate=gate, batch_first=True, device=device)
    )


def trained(gate):
    torch.manual_seed(0)
    layer = layer_of(gate)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    hw.anneal(layer, 0.7)
    for _ in range(3):
        y = layer(x := torch.randn(4, 5, D) * 3 + 1, x, x, need_weights=False)[0]
        y.square().sum().backward()
    return layer.eval()


def moved(layer, gate, how):
    state = layer.state_dict()
    if how == "meta":
        other = layer_of(gate, "meta").to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.fill_(1)  # what happens to be in memory
        other.load_state_dict(state)
    elif how == "assign":
        other = layer_of(gate, "meta")
        other.load_state_dict(copy.deepcopy(state), assign=True)
    elif how == "plain":
        other = layer_of(gate)
        other.load_state_dict(state)
    else:
        other = pickle.loads(pickle.dumps(layer)) if how == "pickle" else copy.deepcopy(layer)
    return hw.link_gates(other).eval()


@pytest.mark.parametrize("how", ["plain", "meta", "assign", "pickle", "copy"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_state_is_whole(gate, how):
    layer = trained(gate)
    other = moved(layer, gate, how)
    assert not [b for b in other.buffers() if b.is_meta]
    x = torch.randn(6, 5, D)
    padding = torch.arange(5) >= torch.tensor([5, 2, 1, 4, 3, 5])[:, None]
    for module in (layer, other):
        torch.manual_seed(5)
        module.result = module.gate(x, padding)
    for got, expected in zip(other.result, layer.result, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_no_gate_has_a_buffer_that_is_not_saved():
    for gate in GATES:
        layer = layer_of(gate)
        assert {name for name, _ in layer.gate.named_buffers()} <= set(layer.gate.state_dict())


def test_what_was_requested_is_no_state():
    layer = layer_of(hw.RequestedBudgetGate(0.5)).eval()
    hw.request_budget(layer, torch.tensor([0.25, 1.0]))
    other = layer_of(hw.RequestedBudgetGate(0.5)).eval()
    other.load_state_dict(layer.state_dict())
    assert other.gate(torch.randn(2, 3, D)).count.tolist() == [3, 3]


@pytest.mark.parametrize("gate", [hw.BudgetGate(), hw.HardConcreteGate()])
def test_frozen_gates_are_reported(gate):
    """Adapters freeze all other parameters."""
    model = nn.Sequential(lively(gate))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()(torch.randn(2, 3, D))
    with pytest.warns(UserWarning, match="the gates are frozen"):
        hw.penalty(model)
