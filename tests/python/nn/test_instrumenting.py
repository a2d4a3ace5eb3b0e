"""Observing, overriding and probing a model's layers, and restoring them."""

import headwise as hw
import pytest
import torch
from headwise.nn import scaled_heads
from support.planted import Planted, outputs
from torch import nn

WEIGHTS = ([1.0, -0.5, 2.0, 0.0], [0.25, 1.5, 0.0, 3.0])
NAMES = ["layers.0", "layers.1"]


@pytest.fixture
def model():
    return Planted(*WEIGHTS)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4, dtype=torch.float64)


def only(*heads):
    weight = torch.zeros(4, dtype=torch.float64)
    weight[list(heads)] = 1.0

    def select(name, x, choose):
        index, count = torch.ops.headwise.select_nonzero(weight.expand(len(x), -1))
        return hw.Selection(index, count, weight.expand(len(x), -1))

    return select


def test_an_override_decides_what_runs(model, x):
    with hw.nn.instrument(model) as opened:
        assert list(opened.layers) == NAMES and opened.model is model
        opened.override(only(0, 3))
        without = [(layer, head) for layer in (0, 1) for head in (1, 2)]
        torch.testing.assert_close(model(x), outputs(WEIGHTS, x, without))
    torch.testing.assert_close(model(x), outputs(WEIGHTS, x))
    assert all(layer.gate is None for layer in model.layers)


def test_an_override_may_ask_what_the_gate_chooses(model, x):
    gate = hw.FixedGate([1, 2])
    model.layers[0].set_gate(gate)
    asked = {}

    def halve(name, x, choose):
        asked[name] = selection = choose()
        return selection._replace(weight=selection.weight / 2)

    with hw.nn.instrument(model) as opened:
        opened.override(halve)
        half = [[w / 2 for w in row] for row in WEIGHTS]
        torch.testing.assert_close(model(x), outputs(half, x, [(0, 0), (0, 3)]))
    assert asked["layers.0"].count.tolist() == [2] * 3  # the gate's
    assert asked["layers.1"].count.tolist() == [4] * 3  # all heads: no gate
    assert model.layers[0].gate is model.layers[0]._modules["gate"]


def test_a_gate_that_is_not_asked_is_not_run(model, x):
    model.layers[0].set_gate(hw.FixedGate([0]))
    calls = []
    model.layers[0].gate.register_forward_hook(lambda *_: calls.append(1))
    with hw.nn.instrument(model) as opened:
        opened.override(only(1))
        model(x)
    assert not calls


def test_the_last_override_is_asked_first(model, x):
    order = []

    def named(which):
        def change(name, x, choose):
            order.append(which)
            return choose()

        return change

    with hw.nn.instrument(model) as outer:
        outer.override(named("first"))
        outer.override(named("second"))
        with hw.nn.instrument(model) as inner:
            inner.override(named("third"))
            model(x)
        assert order == ["third", "second", "first"] * 2
        order.clear()
        model(x)
        assert order == ["second", "first"] * 2


def test_observers_see_gates_and_overrides(model, x):
    model.layers[1].set_gate(hw.FixedGate([2]))
    seen = []

    def observe(name, layer, selection, x, padding):
        seen.append((name, layer, selection.count.tolist(), tuple(x.shape), padding))

    with hw.nn.instrument(model) as opened:
        opened.observe(observe)
        model(x)
        assert seen == [("layers.1", model.layers[1], [1] * 3, (3, 1, 4), None)]
        seen.clear()
        opened.override(only(0, 1))
        model(x)
        assert [(name, count) for name, _, count, _, _ in seen] == [(n, [2] * 3) for n in NAMES]
    assert not any(layer._observers for layer in model.layers)


def test_probes_see_what_every_head_computes(model, x):
    model.layers[0].set_gate(hw.FixedGate([2]))
    seen = {}
    twice = []
    with hw.nn.instrument(model) as opened:
        opened.probe(lambda name, layer, probe: seen.update({name: probe}))
        opened.probe(lambda name, layer, probe: twice.append(name))
        y = model(x)
    torch.testing.assert_close(y, outputs(WEIGHTS, x, [(0, 0), (0, 1), (0, 3)]))
    assert twice == list(seen) == NAMES
    for probe in seen.values():  # [B, H, L, d] of each head: feature h of the input
        torch.testing.assert_close(probe.context[:, :, 0, 0], x)
    assert seen["layers.0"].weight[0].tolist() == [0, 0, 1, 0] and seen["layers.1"].weight is None
    assert all(layer._probe is None for layer in model.layers)


def test_the_mode_is_put_back_whatever_happens(model, x):
    model.train()
    model.layers[0].eval()
    with pytest.raises(KeyError), hw.nn.instrument(model) as opened:
        assert not any(module.training for module in model.modules())
        opened.override(only(0))
        opened.observe(lambda *_: None)
        raise KeyError
    assert model.training and not model.layers[0].training and model.layers[1].training
    assert all(layer.gate is None and not layer._observers for layer in model.layers)
    with hw.nn.instrument(model, evaluate=False):
        assert model.training


def test_heads_that_attend_in_their_own_way_keep_it():
    """A gate that also changes how heads attend does so under an override too."""
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(
        16, 4, batch_first=True, gate=hw.ThresholdGate(resolution=8.0, approximate=True)
    )
    layer.eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        layer.gate.threshold.fill_(0.0)
        expected = layer(x, x, x, need_weights=False)[0]
        with hw.nn.instrument(layer) as opened:
            opened.override(lambda name, x, choose: hw.gates.select_all(len(x), 4))
            torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)
        layer.set_gate(None)
        assert not torch.allclose(layer(x, x, x, need_weights=False)[0], expected)


def test_scaled_heads_multiply_and_are_differentiable(model, x):
    model.layers[0].set_gate(hw.FixedGate([0, 1]))
    with hw.nn.instrument(model) as opened:
        scales = scaled_heads(opened)
        scales["layers.0"][0] = 0.0
        factor = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
        scales["layers.1"] = factor
        y = model(x)
    expected = (WEIGHTS[0], [w * f for w, f in zip(WEIGHTS[1], factor.tolist(), strict=True)])
    torch.testing.assert_close(y, outputs(expected, x, [(0, 0), (0, 2), (0, 3)]))
    (gradient,) = torch.autograd.grad(y.sum(), factor)
    torch.testing.assert_close(gradient, x.sum(0) * torch.tensor(WEIGHTS[1], dtype=torch.float64))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        with hw.nn.instrument([]):
            pass
    with hw.nn.instrument(nn.Linear(2, 2)) as opened:
        assert opened.layers == {}
