"""Activation checkpointing: the same gradients, and no state touched twice."""

import copy

import headwise as hw
import pytest
import torch
from headwise.gates.model import gates
from torch import nn
from torch.utils.checkpoint import checkpoint

D, H, LAYERS = 16, 4, 3
GATES = {
    "budget": hw.BudgetGate(hidden_dim=8, entropy_strength=0.1),
    "budget, fixed": hw.BudgetGate(budget=0.5, relaxation="straight_through", execution="selected"),
    "hard concrete": hw.HardConcreteGate(init_log_alpha=0.0),
    "hard concrete, dynamic": hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0),
    "gumbel sigmoid": hw.GumbelSigmoidGate(init_logit=0.0),
    "subset": hw.SubsetGate(keep=0.5, temperature=2.0),
    "subset, by layer": hw.SubsetGate(keep=0.5, temperature=2.0, scope="layer"),
    "subset, straight through": hw.SubsetGate(keep=0.5, estimator="straight_through"),
    "requested": hw.RequestedBudgetGate(),
    "requested, selected": hw.RequestedBudgetGate(scope="layer", execution="selected"),
    "sleep": hw.SleepGate(0.5, every=1, asleep_by=0.0),
    "sleep, selected": hw.SleepGate(
        0.5, every=1, probe_every=2, asleep_by=0.0, execution="selected"
    ),
    "random": hw.RandomGate(0.5),
    "threshold": hw.ThresholdGate(0.02, resolution=4.0),
    "shared": hw.SharedHeadsGate(hw.BudgetGate(0.5, hidden_dim=8), shared=[1]),
    "shared subset": hw.SharedHeadsGate(hw.SubsetGate(keep=0.5, temperature=2.0), shared=[2]),
    "group": hw.GroupGate(hw.BudgetGate(hidden_dim=8)),
}


class Model(nn.Module):
    """Layers of attention with dropout; ``mode`` is what is checkpointed."""

    def __init__(self, gate):
        super().__init__()
        self.mode = None
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(D, H, dropout=0.1, batch_first=True, gate=gate)
            for _ in range(LAYERS)
        )
        self.drop = nn.Dropout(0.2)

    def step(self, layer, x):
        return x + self.drop(layer(x, x, x, need_weights=False)[0])

    def forward(self, x):
        if self.mode == "nested":
            return checkpoint(self.run, x, True, use_reentrant=False)
        return self.run(x, self.mode is not None)

    def run(self, x, checkpointed):
        reentrant = self.mode == "reentrant"
        for layer in self.layers:
            x = (
                checkpoint(self.step, layer, x, use_reentrant=reentrant)
                if checkpointed
                else self.step(layer, x)
            )
        return x


def lively_model(gate):
    model = hw.link_gates(Model(gate)).train()
    with torch.no_grad():
        for module in gates(model):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
    hw.anneal(model, 0.5)
    return model


def result(model, mode, forwards, penalised):
    """Gradients, state and records after three training steps of a copy of the model."""
    model = hw.link_gates(copy.deepcopy(model))
    model.mode = mode
    torch.manual_seed(3)
    seen = []
    for layer in model.layers:
        layer._observers.append(lambda layer, selection, x, padding: seen.append(selection.count))
    for _ in range(3):
        inputs = [torch.randn(5, 6, D, requires_grad=True) for _ in range(forwards)]
        loss = sum(model(x).square().mean() * (i + 1) for i, x in enumerate(inputs))
        if penalised:
            loss = loss + hw.penalty(model)
        loss.backward()
    found = {f"x{i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= model.state_dict()
    for number, gate in enumerate(gates(model)):
        if gate.expected_heads is not None:
            found[f"expected heads of {number}"] = gate.expected_heads.detach()
    found["next"] = torch.rand(3)
    return found, torch.cat(seen), hw.gates.head_moves(model)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant", "nested"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("name", GATES)
def test_checkpointing_changes_nothing(name, mode, forwards):
    torch.manual_seed(0)
    model = lively_model(GATES[name])
    penalised = mode != "reentrant"  # there no gradient can reach what a layer records
    plain, seen, moves = result(model, None, forwards, penalised)
    again, seen_again, moves_again = result(model, mode, forwards, penalised)
    assert sorted(again) == sorted(plain)
    for key, value in plain.items():
        torch.testing.assert_close(
            again[key], value, atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert torch.equal(seen, seen_again)
    assert [(move["step"], move["head"]) for move in moves] == [
        (move["step"], move["head"]) for move in moves_again
    ]


@pytest.mark.parametrize("name", ["budget", "hard concrete, dynamic", "gumbel sigmoid"])
def test_compiled_layers_in_a_checkpoint(name):
    """A compiled forward cannot ask whether it is repeated: the operator that updates does."""
    torch.manual_seed(0)
    model = lively_model(GATES[name])
    found = []
    for compiled in (False, True):
        own = copy.deepcopy(model)
        own.drop.p = 0.0
        torch.manual_seed(4)
        x = torch.randn(5, 6, D, requires_grad=True)
        for layer in own.layers:
            layer.dropout = 0.0
            layer.gate.anneal(1.0)
        own.mode = "not reentrant"
        if compiled:
            torch._dynamo.reset()
            for position, layer in enumerate(own.layers):
                own.layers[position] = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            own(x).square().mean().backward()
        state = {n.replace("_orig_mod.", ""): b for n, b in own.named_buffers()}
        assert all(b == 2 for n, b in state.items() if n.endswith("feature_batches"))
        grads = {n.replace("_orig_mod.", ""): p.grad for n, p in own.named_parameters()}
        found.append({**state, **{f"gradient {n}": g for n, g in grads.items() if g is not None}})
    plain, again = found
    assert sorted(plain) == sorted(again)
    for key, value in plain.items():
        torch.testing.assert_close(
            again[key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
