"""Gates: their mathematics against plain formulas, their training, their errors."""

import json
import math
import warnings

import headwise as hw
import pytest
import torch
from headwise.testing import check_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gates import EVERY_GATE, D, H, assert_consistent, lively

ops = torch.ops.headwise


def name_of(gate):
    return type(gate).__name__


@pytest.mark.parametrize(
    "gate", [*EVERY_GATE, hw.GroupGate(hw.BudgetGate()), hw.ThresholdGate(0.1)], ids=name_of
)
def test_a_gate_passes_its_checks(gate):
    check_gate(gate, compiles=False)  # test_dynamic_batch.py compiles them


@pytest.mark.parametrize("gate", EVERY_GATE, ids=lambda gate: type(gate).__name__)
def test_config_round_trip(gate):
    config = json.loads(json.dumps(gate.config()))
    assert hw.gates.gate_from_config(config).config() == gate.config()
    with pytest.raises(ValueError, match=f"{config['type']} has no option 'colour'"):
        hw.gates.gate_from_config({**config, "colour": 1})
    with pytest.raises(ValueError, match="gate type must be one of BankGate, BudgetGate"):
        hw.gates.gate_from_config({"type": "OtherGate"})


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 9),
    temperature=st.floats(0.05, 3.0),
    seed=st.integers(0, 10_000),
)
def test_soft_top_k_has_the_mass_and_the_order(batch, heads, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, generator=generator, dtype=torch.float64) * 3
    mass = torch.rand(batch, generator=generator, dtype=torch.float64) * (heads - 0.1) + 0.05
    soft = ops.soft_top_k(scores, mass, torch.tensor(temperature))
    torch.testing.assert_close(soft.sum(1), mass, atol=1e-6, rtol=1e-6)
    assert ((soft >= 0) & (soft <= 1)).all()
    order = scores.argsort(1)
    assert (soft.gather(1, order).diff(dim=1) >= -1e-12).all()


def test_soft_top_k_gradient():
    """Against differences: the threshold moves with scores and mass."""
    torch.manual_seed(0)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mass = torch.tensor([0.7, 2.5, 4.2], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.7)
    soft = ops.soft_top_k(scores, mass, tau)
    direction = torch.randn_like(soft)
    gradients = torch.autograd.grad((soft * direction).sum(), (scores, mass))
    step = 1e-5
    for which, gradient in enumerate(gradients):
        for position in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [scores.detach().clone(), mass.detach().clone()]
                moved[which].view(-1)[position] += sign * step
                values.append((ops.soft_top_k(*moved, tau) * direction).sum())
            numeric = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient.view(-1)[position], numeric, atol=1e-6, rtol=1e-4)


def test_full_mass_is_exactly_one():
    soft = ops.soft_top_k(torch.randn(2, 4), torch.full((2,), 4.0), torch.tensor(0.5))
    assert torch.equal(soft, torch.ones(2, 4))


def test_masked_mean():
    x = torch.randn(3, 5, D, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 2:] = True
    padding[2] = True
    expected = torch.stack([x[0, :2].mean(0), x[1].mean(0), torch.zeros(D, dtype=torch.float64)])
    torch.testing.assert_close(ops.masked_mean(x, padding), expected)
    additive = torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding, -math.inf)
    torch.testing.assert_close(ops.masked_mean(x, additive), expected)
    torch.testing.assert_close(ops.masked_mean(x), x.mean(1))


def test_hard_concrete_formulas():
    log_alpha = torch.linspace(-6, 6, 25, dtype=torch.float64)
    u = torch.rand(25, dtype=torch.float64)
    eps = u * (1 - 2e-6) + 1e-6
    s = torch.sigmoid((eps.log() - (1 - eps).log() + log_alpha) / 0.33)
    torch.testing.assert_close(ops.hard_concrete(log_alpha, u), (s * 1.2 - 0.1).clamp(0, 1))
    still = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(ops.hard_concrete(log_alpha), still)
    samples = torch.stack([ops.hard_concrete(log_alpha, torch.rand(25)) for _ in range(4000)])
    measured = (samples > 0).double().mean(0)
    assert (measured - ops.hard_concrete_open(log_alpha)).abs().max() < 0.04


@pytest.mark.parametrize(
    ("rounding", "expected"), [("round", [1, 1, 3, 4, 6]), ("ceil", [1, 2, 3, 4, 6])]
)
def test_budget_count(rounding, expected):
    budget = torch.tensor([0.01, 0.2, 0.5, 0.6, 1.0])
    counts = ops.budget_count(budget, 6, 1, rounding).tolist()
    assert counts == expected


def test_running_statistics_are_those_of_all_inputs():
    torch.manual_seed(0)
    gate = hw.BudgetGate().bind(D, H)
    batches = [torch.randn(4, 3, D) * 2 + 1 for _ in range(10)]
    for x in batches:
        gate(x)
    pooled = torch.cat(batches).mean(1)
    torch.testing.assert_close(gate.feature_mean, pooled.mean(0))
    torch.testing.assert_close(gate.feature_variance, pooled.var(0, unbiased=False))
    gate.eval()
    before = gate.feature_mean.clone()
    gate(batches[0] * 9)
    assert torch.equal(gate.feature_mean, before)


@pytest.mark.parametrize("rounding", ["round", "ceil"])
@pytest.mark.parametrize("kept_weight", ["one", "soft"])
@pytest.mark.parametrize("relaxation", ["exact_mass", "straight_through"])
def test_budget_gate_trains_what_it_runs(relaxation, kept_weight, rounding):
    """At the end of annealing training gives evaluation's weights, exactly."""
    torch.manual_seed(0)
    gate = lively(hw.BudgetGate(relaxation=relaxation, kept_weight=kept_weight, rounding=rounding))
    x = torch.randn(7, 4, D)
    gate(x)
    for progress in (0.75, 1.0):
        gate.train()
        gate.anneal(progress)
        trained = gate(x)
        gate.eval()
        run = gate(x)
        torch.testing.assert_close(trained.weight * (run.weight != 0), run.weight)
        assert (trained.weight[run.weight == 0].abs() < 1e-6).all()
        assert trained.weight.requires_grad
    assert len(set(run.count.tolist())) > 1


def test_hard_concrete_noise_per_sequence_or_batch():
    x = torch.randn(8, 3, D)
    for noise_per, distinct in (("sequence", 8), ("batch", 1)):
        gate = lively(hw.HardConcreteGate(noise_per=noise_per, init_log_alpha=0.0), 0.3).train()
        # Rounded: the last elements of a vectorised loop may differ in their last bits.
        assert len(gate(x).weight.round(decimals=5).unique(dim=0)) == distinct


def test_hard_concrete_gate_trains_what_it_runs():
    torch.manual_seed(0)
    for kept_weight in ("gate", "one"):
        gate = lively(hw.HardConcreteGate(input_dependent=True, kept_weight=kept_weight))
        x = torch.randn(7, 4, D)
        gate(x)
        gate.anneal(1.0)
        trained = gate(x)
        run = gate.eval()(x)
        torch.testing.assert_close(trained.weight, run.weight)
        assert torch.equal((run.weight != 0).sum(1).int(), run.count)
        if kept_weight == "one":
            assert set(run.weight.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"budget": 1.0}])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_full_budget_is_the_dense_layer_exactly(options, progress):
    gate = hw.BudgetGate(**options).bind(D, H)
    gate.anneal(progress)
    x = torch.randn(3, 4, D)
    for training in (True, False):
        selection = gate.train(training)(x)
        assert torch.equal(selection.weight, torch.ones(3, H))
        assert (selection.count == H).all()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    for gate in (hw.BudgetGate(entropy_strength=0.1), hw.HardConcreteGate(input_dependent=True)):
        for progress in (0.5, 1.0):
            bound = lively(gate, 0.3)
            bound.anneal(progress)
            x = torch.randn(8, 4, D)
            bound(x)
            weight = bound(x).weight
            (weight * torch.randn_like(weight)).sum().backward()
            for name, parameter in bound.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_static_phase_ignores_the_input():
    for gate in (hw.BudgetGate(noise_scale=0.0), hw.HardConcreteGate(input_dependent=True)):
        bound = lively(gate)
        bound.anneal(0.2)
        relevance = bound(torch.randn(8, 4, D)).relevance
        assert (relevance == relevance[0]).all()
        bound.anneal(0.5)
        relevance = bound(torch.randn(8, 4, D)).relevance
        assert not (relevance == relevance[0]).all()


def test_penalty_of_mixed_gates_is_of_those_that_have_one():
    """Gates without a share to aim at do not dilute it; tests/cpp/test_gates.cpp has the same."""
    budget = lively(hw.BudgetGate(target_scope="layer"))
    others = [
        hw.FixedGate(),
        hw.RandomGate(),
        hw.SubsetGate(scope="layer"),
        hw.SleepGate(scope="layer"),
        hw.ThresholdGate(),
    ]
    model = torch.nn.ModuleList([*(gate.bind(D, H) for gate in others), budget]).train()
    x = torch.randn(5, 4, D)
    for gate in model:
        if not gate.reads_heads:
            gate(x)
    assert budget.penalty() > 0
    torch.testing.assert_close(hw.penalty(model), budget.penalty(), rtol=0, atol=0)

    class Own(hw.FixedGate):
        def penalty(self):
            return torch.tensor(3.0)

    model.append(Own().bind(D, H))
    torch.testing.assert_close(hw.penalty(model), (budget.penalty() + 3.0) / 2)


def test_pooled_penalty():
    """One target for both layers together: (mean share - target)^2 * strength."""
    torch.manual_seed(0)
    gates = [lively(hw.BudgetGate(0.4, bounds_strength=0.0), 0.5) for _ in range(2)]
    model = torch.nn.ModuleList(gates)
    hw.anneal(model, 1.0)
    counts = [gate(torch.randn(9, 4, D)).budget for gate in gates]
    share = sum(gate.expected_heads.mean() for gate in gates) / (2 * H)
    torch.testing.assert_close(hw.penalty(model), 20.0 * (share - 0.4) ** 2)
    assert [len(budget) for budget in counts] == [9, 9]
    hw.penalty(model).backward()
    assert all(gate.budget_out.bias.grad.abs() > 0 for gate in gates)

    own = torch.nn.ModuleList(
        [lively(hw.BudgetGate(0.4, target_scope="layer", bounds_strength=0.0)) for _ in range(2)]
    )
    hw.anneal(own, 1.0)
    for gate in own:
        gate(torch.randn(9, 4, D))
    terms = [20.0 * (gate.expected_heads.mean() / H - 0.4) ** 2 for gate in own]
    torch.testing.assert_close(hw.penalty(own), sum(terms) / 2)


def test_penalties_of_hard_concrete_gates():
    torch.manual_seed(0)
    x = torch.randn(5, 4, D)
    gate = lively(hw.HardConcreteGate(penalty="l0", strength=0.1))
    gate(x)
    expected = 0.1 * ops.hard_concrete_open(gate.log_alpha).sum()
    torch.testing.assert_close(hw.penalty(gate), expected)

    gate = lively(hw.HardConcreteGate(0.25, penalty="lagrangian", strength=1.0, warmup=0.0))
    gate(x)
    off = ops.hard_concrete_open(gate.log_alpha).mean() - 0.25
    first, second = gate.multipliers.tolist()
    loss = hw.penalty(gate)
    torch.testing.assert_close(loss, first * off + second * off**2)
    loss.backward()  # descent on the loss must ascend in the multipliers
    torch.testing.assert_close(gate.multipliers.grad, -torch.stack([off, off**2]).detach())


def test_penalty_without_a_forward_is_zero():
    assert hw.penalty(torch.nn.Linear(2, 2)) == 0
    assert hw.penalty(hw.BudgetGate().bind(D, H)) == 0
    assert hw.penalty(hw.FixedGate().bind(D, H)) == 0


def test_penalty_of_a_forward_without_gradients_warns():
    """As in ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    x = torch.randn(2, 5, 16)
    for gate, learns in (
        (hw.HardConcreteGate(), True),
        (hw.BudgetGate(), True),
        (hw.BudgetGate(budget=0.5), False),
    ):
        layer = hw.MultiheadAttention(16, 4, gate=gate)
        with torch.no_grad():
            layer(x, x, x)
            hw.penalty(layer)
        if learns:
            with pytest.warns(UserWarning, match="the penalty has no gradient, because the forwa"):
                hw.penalty(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if not learns:
                hw.penalty(layer)
            layer(x, x, x)
            hw.penalty(layer)


def test_budget_gate_learns_different_heads_for_different_inputs():
    """Two kinds of input need two heads each: the gate must find them at a third of the heads."""
    torch.manual_seed(0)
    gate = hw.BudgetGate(1 / 3, noise_scale=0.1).bind(D, H)
    optimiser = torch.optim.Adam(gate.parameters(), 0.05)
    kind = torch.arange(64) % 2
    useful = torch.zeros(64, H)
    useful[kind == 0, :2] = useful[kind == 1, 3:5] = 1
    direction = torch.randn(D)
    for step in range(200):
        hw.anneal(gate, step / 199)
        x = torch.randn(64, 3, D) + direction * (2.0 * kind - 1)[:, None, None]
        loss = -(gate(x).weight * useful).sum(1).mean() + hw.penalty(gate)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    selection = gate.eval()(x)
    assert ((selection.weight * useful).sum(1) > 1.5).float().mean() > 0.9
    assert abs(selection.count.float().mean() / H - 1 / 3) < 0.05


def test_static_hard_concrete_gates_close_what_is_not_needed():
    """Voita et al.: from open gates, with the loss of each module; three heads of twelve matter."""
    torch.manual_seed(0)
    useful = torch.zeros(2 * H)
    useful[[1, 4, 9]] = 1.0
    gates = torch.nn.ModuleList(
        [hw.HardConcreteGate(penalty="l0", strength=0.1).bind(D, H) for _ in range(2)]
    )
    optimiser = torch.optim.Adam(gates.parameters(), 0.1)
    x = torch.randn(8, 3, D)
    for step in range(200):
        hw.anneal(gates, step / 199)
        weight = torch.cat([gate(x).weight for gate in gates], 1)  # [B, 2 H]
        loss = ((1 - weight) * useful).square().sum(1).mean() + hw.penalty(gates)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    gates.eval()
    left = torch.cat([gate(x).weight[0] for gate in gates])
    assert torch.equal(left > 0, useful > 0)
    assert (left[useful > 0] > 0.8).all()


def test_start_gates_from_a_ranking():
    options = {"gate": hw.BudgetGate(0.5, warmup=0.0, static_until=0.0), "batch_first": True}
    model = torch.nn.ModuleDict(
        {name: hw.MultiheadAttention(12, 3, **options) for name in ("first", "second")}
    )
    importance = {"first": torch.tensor([3.0, 9.0, 1.0]), "second": torch.tensor([7.0, 2.0, 8.0])}
    hw.start_gates(model, importance, keep=0.5)
    model.eval()
    x = torch.randn(4, 5, 12)
    first, second = model["first"].gate(x), model["second"].gate(x)
    assert first.index.tolist() == [[1, -1, -1]] * 4
    assert second.index.tolist() == [[0, 2, -1]] * 4
    with pytest.raises(ValueError, match="importance must have a score for layer 'second'"):
        hw.start_gates(model, {"first": torch.ones(3)}, keep=0.5)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        hw.start_gates(model, importance, keep=0)
    spoilt = {**importance, "second": torch.tensor([7.0, math.nan, 8.0])}
    with pytest.raises(ValueError, match="importance of layer 'second' must be finite, got NaN"):
        hw.start_gates(model, spoilt, keep=0.5)
    assert torch.equal(model["first"].gate(x).index, first.index)


def test_random_gate_follows_the_seed():
    gate = hw.RandomGate(0.5).bind(D, H).eval()
    x = torch.randn(30, 4, D)
    torch.manual_seed(3)
    first = gate(x)
    torch.manual_seed(3)
    assert torch.equal(gate(x).index, first.index)
    assert not torch.equal(gate(x).index, first.index)
    assert (first.count == 3).all()
    fixed = hw.RandomGate(0.5, per_input=False).bind(D, H)
    assert torch.equal(fixed(x).index, fixed(x).index[:1].expand(30, -1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_input_that_is_not_finite(value):
    x = torch.randn(2, 4, D)
    x[1, 2, 3] = value
    for gate in (hw.BudgetGate(), hw.HardConcreteGate(input_dependent=True)):
        bound = lively(gate).eval()
        with pytest.raises(ValueError, match="relevance must be finite, got -?(nan|inf) at row 1"):
            bound(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hw.BudgetGate(0.0), "keep must be in (0, 1], got 0.0"),
        (lambda: hw.BudgetGate(budget=1.5), "budget must be in (0, 1], got 1.5"),
        (
            lambda: hw.BudgetGate(0.05),
            "keep must lie between min_budget=0.1 and max_budget=1.0, got 0.05",
        ),
        (lambda: hw.BudgetGate(rounding="up"), "rounding must be one of round, ceil, got 'up'"),
        (
            lambda: hw.BudgetGate(execution="some"),
            "execution must be one of all, selected, got 'some'",
        ),
        (
            lambda: hw.BudgetGate(target_scope="net"),
            "target_scope must be one of model, layer, got 'net'",
        ),
        (lambda: hw.HardConcreteGate(beta=0), "beta must be positive and finite, got 0.0"),
        (
            lambda: hw.HardConcreteGate(zeta=1.0),
            "gamma must be below 0 and zeta above 1, got -0.1 and 1.0",
        ),
        (lambda: hw.RandomGate(0), "keep must be in (0, 1], got 0.0"),
        (
            lambda: hw.FixedGate([0], scale=[1.0]),
            "heads and scale must not both be given, got heads=[0] and scale=[1.0]",
        ),
        (
            lambda: hw.BudgetGate(keep=0.5, budget=0.25),  # 0.5 is the default
            "keep and budget must not both be given, got keep=0.5 and budget=0.25",
        ),
        (
            lambda: hw.gates.gate_from_config({"type": "BudgetGate", "keep": 0.3, "budget": 0.25}),
            "keep and budget must not both be given, got keep=0.3 and budget=0.25",
        ),
        (
            lambda: hw.BudgetGate(budget=0.25, max_budget=0.5),
            "min_budget, max_budget and hidden_dim belong to a predicted budget and must not be "
            "given with budget=0.25",
        ),
        (
            lambda: hw.BudgetGate(keep=1.0, max_budget=0.5),
            "keep must lie between min_budget=0.1 and max_budget=0.5, got 1.0",
        ),
        (
            lambda: hw.SubsetGate(3, keep=0.5),
            "k and keep must not both be given, got k=3 and keep=0.5",
        ),
        (
            lambda: hw.SharedHeadsGate({"type": "SubsetGate", "k": 3, "keep": 0.25}),
            "k and keep must not both be given, got k=3 and keep=0.25",
        ),
        (
            lambda: hw.HardConcreteGate(keep=0.25, penalty="l0"),
            "keep must not be given with penalty='l0', which has no target: strength decides how "
            "many heads close, got keep=0.25",
        ),
        (lambda: hw.FixedGate([7]).bind(D, H), "heads must be in 0..5, got 7"),
        (lambda: hw.FixedGate([1, 1]).bind(D, H), "heads must not name a head twice, got 1 again"),
        (lambda: hw.FixedGate(scale=[1.0]).bind(D, H), "scale must have 6 values, got 1"),
        (lambda: hw.FixedGate().bind(D, H).anneal(2), "progress must be between 0 and 1, got 2"),
        (
            lambda: hw.FixedGate().bind(D, H)(torch.randn(2, 3, 5)),
            "x must have shape [B, L, 16], got [2, 3, 5]",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "gate",
    [hw.BudgetGate(budget=0.25), hw.SubsetGate(3), hw.SubsetGate(keep=0.5)],
)
def test_a_configuration_may_name_the_defaults_of_alternatives(gate):
    """It has all options, also those that the given ones replace."""
    assert hw.gates.gate_from_config(gate.config()).config() == gate.config()
    assert gate.bind(D, H).config() == gate.config()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: hw.BudgetGate("half"), TypeError, "keep must be a number, got 'half'"),
        (lambda: hw.BudgetGate(None), TypeError, "keep must be a number, got None"),
        (lambda: hw.SubsetGate("3"), TypeError, "k must be a number, got '3'"),
        (lambda: hw.SubsetGate(True), TypeError, "k must be a number, got True"),
        (lambda: hw.SubsetGate(2.5), ValueError, "k must be a whole number, got 2.5"),
        (lambda: hw.SubsetGate(math.nan), ValueError, "k must be a whole number, got nan"),
        (lambda: hw.SubsetGate(math.inf), ValueError, "k must be a whole number, got inf"),
        (
            lambda: hw.RandomGate(0.5, per_input="no"),
            TypeError,
            "per_input must be True or False, got 'no'",
        ),
    ],
)
def test_options_of_another_kind(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


def test_options_are_numbers_of_any_kind():
    assert hw.SubsetGate(torch.tensor(3)).config()["k"] == 3
    assert hw.SubsetGate(2.0).config() == hw.SubsetGate(2).config()
    assert hw.BudgetGate(torch.tensor(0.25)).config() == hw.BudgetGate(0.25).config()


def test_unbound_gate_says_so():
    with pytest.raises(RuntimeError, match="BudgetGate is not bound to a layer: call bind"):
        hw.BudgetGate()(torch.randn(2, 3, D))


@pytest.mark.parametrize("gate", EVERY_GATE, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("shape", [(0, 5, D), (3, 0, D), (0, 0, D)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_of_nothing_leaves_nothing_behind(gate, shape, masked):
    torch.manual_seed(0)
    bound = lively(gate)
    x = torch.randn(2, 5, D)
    mask = torch.zeros(shape[:2], dtype=torch.bool) if masked else None
    bound.train()(x)
    before = {name: value.clone() for name, value in bound.state_dict().items()}
    assert_consistent(bound(torch.empty(shape), mask), shape[0])
    assert torch.isfinite(torch.as_tensor(bound.penalty())).all()
    for name, value in bound.state_dict().items():
        assert torch.isfinite(value).all(), name
        if shape[0] == 0:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert_consistent(bound.eval()(torch.empty(shape), mask), shape[0])


def test_an_input_that_overflowed_does_not_spoil_the_statistics():
    torch.manual_seed(0)
    bound = lively(hw.BudgetGate()).train()
    x = torch.randn(4, 5, D)
    bound(x)
    before = [
        b.clone() for b in (bound.feature_mean, bound.feature_variance, bound.feature_batches)
    ]
    with pytest.raises(ValueError, match="relevance must be finite"):
        bound(torch.where(torch.arange(D) == 3, float("inf"), x))
    after = [bound.feature_mean, bound.feature_variance, bound.feature_batches]
    for value, expected in zip(after, before, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    bound(x)


def test_an_argument_that_is_none_names_the_gate():
    with pytest.raises(TypeError, match="BudgetGate: got an unexpected keyword argument"):
        hw.BudgetGate(target=0.5)


@pytest.mark.parametrize(
    "call",
    [
        hw.penalty,
        hw.link_gates,
        lambda model: hw.anneal(model, 0.5),
        lambda model: hw.request_budget(model, 0.5),
        lambda model: hw.parameter_groups(model, 1e-3),
    ],
)
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        call([hw.BudgetGate()])
