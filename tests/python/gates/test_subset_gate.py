"""SubsetGate: K heads, over the whole annealing range, alone and for a whole model."""

import copy
import math
import pickle

import headwise as hw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.headwise
D, H = 12, 3


def reference_sample(r, k, tau):
    """The recursion of Li, Cotterell and Sachan, in plain numbers."""
    r = list(r)
    total = [0.0] * len(r)
    for _ in range(k):
        highest = max(r)
        powers = [math.exp((value - highest) / tau) for value in r]
        p = [power / sum(powers) for power in powers]
        total = [t + share for t, share in zip(total, p, strict=True)]
        tiny = torch.finfo(torch.float64).tiny
        r = [value + math.log(max(1 - share, tiny)) for value, share in zip(r, p, strict=True)]
    return total


@pytest.mark.parametrize("tau", [1000.0, 1.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_sample_against_plain_python(tau, k):
    torch.manual_seed(k)
    r = torch.randn(6, dtype=torch.float64)
    got = ops.subset_sample(r, k, torch.tensor(tau, dtype=torch.float64))
    expected = torch.tensor(reference_sample(r.tolist(), k, tau), dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 80),
    share=st.floats(0.01, 1.0),
    log_tau=st.floats(math.log(1e-8), math.log(1e3)),
    ties=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_sample_sums_to_k_and_is_finite_forward_and_backward(heads, share, log_tau, ties, seed):
    torch.manual_seed(seed)
    k = max(1, round(share * heads))
    r = torch.randn(heads, dtype=torch.float64) * 3
    if ties:
        r = r.round().clamp(-1, 1)
    r.requires_grad_()
    weight = ops.subset_sample(r, k, torch.tensor(math.exp(log_tau)))
    assert weight.isfinite().all() and (weight >= 0).all()
    assert abs(weight.sum().item() - k) < 1e-9 * heads
    (weight * torch.randn(heads, dtype=torch.float64)).sum().backward()
    assert r.grad.isfinite().all()


@pytest.mark.parametrize("height", [1.0, 50.0, 200.0, 700.0, 2000.0, 1e6])
@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
def test_no_head_is_counted_twice(height, tau):
    r = torch.zeros(8, dtype=torch.float64)
    r[0] = height
    weight = ops.subset_sample(r, 3, torch.tensor(tau, dtype=torch.float64))
    torch.testing.assert_close(weight.sum(), torch.tensor(3.0, dtype=torch.float64))
    if height / tau > 40:  # its share rounds to 1
        expected = torch.tensor([1.0] + [2 / 7] * 7, dtype=torch.float64)
        torch.testing.assert_close(weight, expected)
    if height <= 200:
        plain = torch.tensor(reference_sample(r.tolist(), 3, tau), dtype=torch.float64)
        torch.testing.assert_close(weight, plain, atol=1e-9, rtol=1e-9)


def test_all_heads_tie_at_the_lowest_temperature():
    """Where the plain recursion's gradient overflows: every score the same, 36 of 72 steps."""
    r = torch.zeros(72, dtype=torch.float64, requires_grad=True)
    weight = ops.subset_sample(r, 36, torch.tensor(1e-8))
    (weight * torch.randn(72)).sum().backward()
    assert r.grad.isfinite().all()
    torch.testing.assert_close(weight.sum(), torch.tensor(36.0, dtype=torch.float64))


def test_sample_gradient():
    torch.manual_seed(0)
    r = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for k in (1, 3):
        assert torch.autograd.gradcheck(
            lambda r, k=k: ops.subset_sample(r, k, torch.tensor(0.7)), (r,)
        )


def model(layers=2, **options):
    torch.manual_seed(0)
    built = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(D, H, 16, batch_first=True, dropout=0.0), layers
    )
    return hw.convert(built, hw.SubsetGate(**options))


def counts(model, x):
    with torch.no_grad(), hw.trace(model.eval()) as trace:
        model(x)
    return [selection.count[0].item() for selection in trace.selections.values()]


def gates_of(model):
    return [layer.gate for layer in hw.attention_layers(model).values()]


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_exactly_k_of_the_model(k, tied):
    built = model(k=k)
    if tied:
        for gate in gates_of(built):
            torch.nn.init.zeros_(gate.scores)
    x = torch.randn(3, 5, D)
    assert sum(counts(built, x)) == k
    built.train()
    for progress in (0.0, 0.4, 0.7, 1.0):
        hw.anneal(built, progress)
        built(x)
        total = sum(gate.expected_heads[0].item() for gate in gates_of(built))
        assert abs(total - k) < 1e-5


def test_exactly_k_of_each_layer():
    assert counts(model(k=2, scope="layer"), torch.randn(1, 4, D)) == [2, 2]
    assert counts(model(keep=0.5, scope="layer"), torch.randn(1, 4, D)) == [2, 2]


def test_one_draw_for_the_whole_model_and_a_new_one_each_forward():
    built = model(layers=3, k=4).train()
    hw.anneal(built, 0.5)
    first, second, third = gates_of(built)
    x = torch.randn(2, 4, D)
    drawn = []
    for _ in range(2):
        rows = [gate(x).weight[0] for gate in (first, second, third)]
        drawn.append(torch.cat(rows))
        assert abs(drawn[-1].sum().item() - 4) < 1e-4
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("execution", ["all", "selected"])
@pytest.mark.parametrize("estimator", ["gumbel", "straight_through"])
def test_gradients_reach_the_scores_of_every_layer(estimator, execution):
    built = model(k=3, estimator=estimator, execution=execution, temperature=1.0).train()
    for progress in (0.3, 1.0):
        hw.anneal(built, progress)
        built.zero_grad()
        built(torch.randn(4, 5, D)).square().sum().backward()
        grads = torch.cat([gate.scores.grad for gate in gates_of(built)])
        assert grads.isfinite().all()
        if execution == "all":
            assert (grads != 0).all()


def test_copies_and_files_stay_linked(tmp_path):
    built = model(k=2)
    with torch.no_grad():
        gates_of(built)[0].scores.copy_(torch.tensor([0.0, -1.0, -2.0]))
        gates_of(built)[1].scores.copy_(torch.tensor([3.0, 2.0, -1.0]))
    x = torch.randn(2, 4, D)
    assert counts(built, x) == [0, 2]
    hw.save(built, tmp_path / "m")
    fresh = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(D, H, 16, batch_first=True, dropout=0.0), 2
    )
    copies = (
        copy.deepcopy(built),
        pickle.loads(pickle.dumps(built)),
        hw.load(tmp_path / "m", model=fresh),
    )
    for other in copies:
        assert counts(other, x) == [0, 2]
        assert all(gate._scope.gates[0] is gates_of(other)[0] for gate in gates_of(other))
        with torch.no_grad():
            gates_of(other)[0].scores.fill_(9.0)  # of the copy alone
        assert counts(other, x) == [2, 0]
    assert counts(built, x) == [0, 2]


def test_pruned_model_equals_the_gated_one():
    built = model(k=4).eval()
    x = torch.randn(2, 4, D)
    small = hw.prune(built)
    assert sum(layer.num_heads for layer in hw.attention_layers(small).values()) == 4
    with torch.no_grad():
        torch.testing.assert_close(small(x), built(x), atol=1e-5, rtol=1e-5)


def test_starts_from_a_ranking():
    built = model(k=3)
    names = list(hw.attention_layers(built))
    importance = {names[0]: torch.tensor([5.0, 1.0, 4.0]), names[1]: torch.tensor([2.0, 6.0, 3.0])}
    hw.start_gates(built, importance, keep=0.5)
    assert counts(built, torch.randn(1, 4, D)) == [2, 1]


def test_finds_the_planted_heads():
    """Three of twelve heads of two layers carry what the loss wants; each estimator finds them."""
    useful = torch.zeros(12)
    useful[[1, 4, 9]] = 1.0
    for estimator in ("gumbel", "straight_through"):
        torch.manual_seed(0)
        gates = torch.nn.ModuleList(
            [hw.SubsetGate(k=3, estimator=estimator, temperature=10.0).bind(D, 6) for _ in range(2)]
        )
        hw.link_gates(gates)
        optimiser = torch.optim.Adam(gates.parameters(), 0.1)
        x = torch.randn(4, 3, D)
        for step in range(150):
            hw.anneal(gates, step / 149)
            weight = torch.cat([gate(x).weight for gate in gates], 1)  # [B, 12]
            loss = (weight * useful).sum(1).sub(3).square().mean() + 0.1 * torch.randn(())
            loss = loss + 0.2 * (weight * (1 - useful)).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            optimiser.step()
        gates.eval()
        chosen = torch.cat([gate(x).weight[0] for gate in gates])
        assert torch.equal(chosen, useful), estimator


def test_unlinked_gate_says_so():
    layer = hw.MultiheadAttention(D, H, gate=hw.SubsetGate(k=2), batch_first=True)
    x = torch.randn(2, 4, D)
    with pytest.raises(RuntimeError, match=r"call headwise.link_gates\(model\)"):
        layer(x, x, x, need_weights=False)
    hw.link_gates(layer)
    layer(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hw.SubsetGate(0), "k must be at least 1, got 0"),
        (lambda: model(k=7), "k must be in 1..6, got 7"),
        (lambda: model(k=4, scope="layer"), "k must be in 1..3, got 4"),
        (lambda: hw.SubsetGate(keep=0.0), "keep must be in (0, 1], got 0.0"),
        (
            lambda: hw.SubsetGate(estimator="x"),
            "estimator must be one of gumbel, straight_through, got 'x'",
        ),
        (
            lambda: hw.SubsetGate(final_temperature=0.0),
            "final_temperature must be positive and finite, got 0.0",
        ),
        (
            lambda: ops.subset_sample(torch.zeros(3), 4, torch.tensor(1.0)),
            "k must be in 1..3, got 4",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message


def test_scores_that_are_not_finite():
    built = model(k=2)
    with torch.no_grad():
        gates_of(built)[1].scores[2] = math.nan
    with pytest.raises(ValueError, match="relevance must be finite"):
        counts(built, torch.randn(1, 4, D))
