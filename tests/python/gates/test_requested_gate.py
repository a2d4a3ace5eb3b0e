"""RequestedBudgetGate: one model, any cost, exactly."""

import copy

import headwise as hw
import pytest
import torch

ops = torch.ops.headwise
D, H, LAYERS = 12, 4, 3
N = H * LAYERS


def model(**options):
    torch.manual_seed(0)
    built = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(D, H, 16, batch_first=True, dropout=0.0), LAYERS
    )
    built = hw.convert(built, hw.RequestedBudgetGate(**options))
    with torch.no_grad():
        for gate in gates_of(built):
            for parameter in gate.parameters():
                parameter.normal_()
    return built


def gates_of(model):
    return [layer.gate for layer in hw.attention_layers(model).values()]


def heads_run(model, x):
    """``[B]``: heads of the whole model."""
    with torch.no_grad(), hw.trace(model.eval()) as trace:
        model(x)
    return sum(selection.count for selection in trace.selections.values())


@pytest.mark.parametrize("budget", [0.01, 0.25, 0.5, 0.6, 1.0])
def test_runs_exactly_what_was_requested(budget):
    built = model()
    hw.request_budget(built, budget)
    expected = max(1, int(budget * N + 0.5))
    assert (heads_run(built, torch.randn(5, 4, D)) == expected).all()


def test_a_budget_for_each_sequence():
    built = model()
    hw.request_budget(built, torch.tensor([0.25, 1.0, 0.5]))
    x = torch.randn(3, 4, D)
    assert heads_run(built, x).tolist() == [3, 12, 6]
    hw.request_budget(built, 0.5)
    assert heads_run(built, x).tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="one for each of the 3, got 2"):
        hw.request_budget(built, torch.tensor([0.25, 1.0]))
        heads_run(built, x)


def test_budget_as_an_argument_of_the_gate():
    gate = gates_of(model(scope="layer"))[0].eval()
    x = torch.randn(2, 4, D)
    assert gate(x, budget=0.25).count.tolist() == [1, 1]
    assert gate(x, budget=torch.tensor([0.5, 1.0])).count.tolist() == [2, 4]
    assert gate(x).count.tolist() == [2, 2]  # what was requested before


def test_heads_are_nested_without_tilt_and_input():
    """A larger budget keeps the heads of a smaller one."""
    built = model()
    for gate in gates_of(built):
        torch.nn.init.zeros_(gate.tilt)
        torch.nn.init.zeros_(gate.relevance.weight)
    x = torch.randn(2, 4, D)
    before = torch.zeros(2, N)
    for budget in (0.1, 0.3, 0.5, 0.9, 1.0):
        hw.request_budget(built, budget)
        with torch.no_grad(), hw.trace(built.eval()) as trace:
            built(x)
        now = torch.cat([selection.weight for selection in trace.selections.values()], 1)
        assert (now >= before).all()
        before = now


def test_allocation_against_plain_python():
    torch.manual_seed(0)
    scores, tilts = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    budget = torch.tensor([0.01, 0.3, 0.64, 1.0], dtype=torch.float64)
    got = ops.allocate_budget(scores, tilts, budget, torch.tensor(0.0), False, 0.5, 0.1, 0.75)
    for row, share in zip(got, budget.tolist(), strict=True):
        value = scores + tilts * (share - 0.5)
        best = sorted(range(7), key=lambda head: -value[head])[: max(1, int(share * 7 + 0.5))]
        assert row.nonzero().flatten().tolist() == sorted(best)


def test_training_draws_one_budget_a_sequence_for_all_layers():
    built = model(min_budget=0.25, max_budget=0.75).train()
    hw.anneal(built, 1.0)
    x = torch.randn(6, 4, D)
    drawn, heads = [], 0
    hooks = [
        gate.register_forward_hook(lambda m, a, selection: drawn.append(selection.budget))
        for gate in gates_of(built)
    ]
    built(x)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(budget, drawn[0]) for budget in drawn)
    assert ((drawn[0] >= 0.25) & (drawn[0] <= 0.75)).all() and drawn[0].unique().numel() == 6
    heads = sum(gate.expected_heads for gate in gates_of(built))
    torch.testing.assert_close(heads.detach(), (drawn[0] * N + 0.5).floor())
    built(x).square().sum().backward()
    for gate in gates_of(built):
        for name, parameter in gate.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_learns_an_order_of_heads_that_serves_every_budget():
    """Head 1 of the first layer is worth most, head 2 of the second next, then head 0 of it."""
    torch.manual_seed(0)
    gates = torch.nn.ModuleList(
        [hw.RequestedBudgetGate(noise_scale=0.2).bind(D, 3) for _ in range(2)]
    )
    hw.link_gates(gates)
    worth = torch.tensor([0.1, 4.0, 0.1, 1.0, 0.1, 2.0])
    optimiser = torch.optim.Adam(gates.parameters(), 0.05)
    x = torch.randn(32, 3, D)
    for step in range(150):
        hw.anneal(gates, step / 149)
        loss = -(torch.cat([gate(x).weight for gate in gates], 1) * worth).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    gates.eval()
    order = [1, 5, 3]
    for kept in (1, 2, 3):
        hw.request_budget(gates, kept / 6)
        chosen = torch.cat([gate(x).weight[0] for gate in gates])
        assert sorted(order[:kept]) == chosen.nonzero().flatten().tolist()


def test_copies_are_linked_among_themselves():
    built = model()
    twin = copy.deepcopy(built)
    hw.request_budget(twin, 0.25)
    x = torch.randn(2, 4, D)
    assert heads_run(twin, x).tolist() == [3, 3]
    assert heads_run(built, x).tolist() == [6, 6]
    assert gates_of(twin)[0]._scope.gates[0] is gates_of(twin)[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hw.RequestedBudgetGate(0.0), "budget must be in (0, 1], got 0.0"),
        (
            lambda: hw.RequestedBudgetGate(min_budget=0.9, max_budget=0.2),
            "min_budget must not be above max_budget, got 0.9 and 0.2",
        ),
        (lambda: hw.request_budget(model(), 1.5), "budget must be in (0, 1], got 1.5"),
        (
            lambda: hw.request_budget(model(), torch.tensor([0.5, float("nan")])),
            "budget must be in (0, 1], got nan",
        ),
        (
            lambda: hw.request_budget(model(), torch.ones(2, 2)),
            "budget must have shape [] or [B], got [2, 2]",
        ),
        (
            lambda: hw.request_budget(torch.nn.Linear(2, 2), 0.5),
            "model (Linear) must have a RequestedBudgetGate",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
