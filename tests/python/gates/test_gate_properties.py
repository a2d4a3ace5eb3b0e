"""What holds for every gate, whatever its options, its parameters, its input and its dtype."""

import math

import headwise as hw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gates import EVERY_GATE, D, H, assert_consistent

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DETERMINISTIC = [gate for gate in EVERY_GATE if not isinstance(gate, hw.RandomGate)]
EXAMPLES = settings(max_examples=15, deadline=None)
unit = st.floats(0.0, 1.0)
seeds = st.integers(0, 9999)


def random_gate(gate, seed, scale, dtype=torch.float32):
    """A bound gate of random parameters, and an input [B, L, D] with its padding [B, L]."""
    torch.manual_seed(seed)
    bound = hw.link_gates(gate.bind(D, H, dtype=dtype))
    with torch.no_grad():
        for parameter in bound.parameters():
            parameter.normal_(0.0, scale)
    x = torch.randn(3, 5, D).to(dtype)
    padding = torch.arange(5) >= torch.tensor([5, 2, 1])[:, None]
    return bound, x, padding


@pytest.mark.parametrize("gate", EVERY_GATE, ids=lambda gate: type(gate).__name__)
@EXAMPLES
@given(
    progress=unit,
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    dtype=st.sampled_from(DTYPES),
    execution=st.sampled_from(["all", "selected"]),
    seed=seeds,
)
def test_selections_are_whole_and_finite_all_along_annealing(
    gate, progress, scale, dtype, execution, seed
):
    config = gate.config()
    mixture = isinstance(gate, hw.MixtureOfHeadsGate)
    if not mixture:  # which has no such option
        config.get("gate", config)["execution"] = execution
    bound, x, padding = random_gate(hw.gates.gate_from_config(config), seed, scale, dtype)
    for training in (True, False):
        hw.anneal(bound.train(training), progress)
        selection = bound(x, padding)
        assert_consistent(selection, 3)
        assert selection.weight.dtype == dtype
        for part in (selection.weight, selection.relevance, selection.budget):
            assert part is None or torch.isfinite(part).all()
        assert (selection.count >= 0).all() and (selection.count <= H).all()
        # Annealing draws K heads softly, one after the other, and adds up what each draw gives.
        relaxed = training and isinstance(bound, hw.SubsetGate)
        limit = bound.heads_kept * (1 + 1e-2) if relaxed else 2 * H if mixture else 1
        assert (selection.weight >= 0).all() and (selection.weight <= limit).all()
        if training:
            assert torch.isfinite(hw.penalty(bound))
            if bound.expected_heads is not None:
                assert (bound.expected_heads >= -1e-3).all()
                assert (bound.expected_heads <= H * (1 + 1e-2)).all()
            if selection.weight.requires_grad:
                selection.weight.float().square().sum().backward()
                for parameter in bound.parameters():
                    assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        else:
            assert (selection.weight[selection.weight != 0] > 0).all()
            weighed = (selection.weight != 0).sum(1).int()
            # The weight of a routed head is a probability, which may be too small for a number.
            assert (weighed <= selection.count).all()
            assert mixture or torch.equal(weighed, selection.count)


def chosen(selection):
    """A set of heads for each input."""
    return [set(row[:k].tolist()) for row, k in zip(selection.index, selection.count, strict=True)]


@EXAMPLES
@given(low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0), seed=seeds, rounding=st.booleans())
def test_a_larger_budget_runs_no_fewer_heads_and_the_same_ones(low, high, seed, rounding):
    low, high = sorted((low, high))
    found = []
    for budget in (low, high):
        options = {"budget": budget, "rounding": "ceil" if rounding else "round"}
        bound, x, _ = random_gate(hw.BudgetGate(**options), seed, 1.0)
        found.append(chosen(bound.eval()(x)))
        exact = budget * H
        count = math.ceil(exact - 1e-6) if rounding else math.floor(exact + 0.5)
        assert {len(heads) for heads in found[-1]} == {min(max(count, 1), H)}
    assert all(few <= many for few, many in zip(*found, strict=True))


@EXAMPLES
@given(low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0), seed=seeds)
def test_a_larger_request_runs_no_fewer_heads(low, high, seed):
    bound, x, _ = random_gate(hw.RequestedBudgetGate(scope="layer"), seed, 1.0)
    counts = []
    for budget in sorted((low, high)):
        hw.request_budget(bound.eval(), budget)
        counts.append(bound(x).count)
        assert set(counts[-1].tolist()) == {max(1, math.floor(budget * H + 0.5))}
    assert (counts[0] <= counts[1]).all()


@EXAMPLES
@given(k=st.integers(1, H), tied=st.booleans(), seed=seeds, progress=unit)
def test_subsets_have_exactly_k_heads_and_are_nested(k, tied, seed, progress):
    subsets = []
    for size in (k, min(k + 1, H)):
        bound, x, _ = random_gate(hw.SubsetGate(size, scope="layer"), seed, 0.0 if tied else 1.0)
        hw.anneal(bound, progress)
        bound.train()(x)
        assert bound.expected_heads.tolist() == pytest.approx([size] * 3, abs=1e-4)
        selection = bound.eval()(x)
        assert selection.count.tolist() == [size] * 3
        subsets.append(chosen(selection)[0])
    assert subsets[0] <= subsets[1]


@EXAMPLES
@given(
    shift=st.floats(0.0, 4.0),
    seed=seeds,
    gate=st.sampled_from(
        [hw.HardConcreteGate(), hw.HardConcreteGate(input_dependent=True), hw.GumbelSigmoidGate()]
    ),
)
def test_larger_logits_open_more_heads(shift, seed, gate):
    bound, x, _ = random_gate(gate, seed, 1.0)
    hw.anneal(bound.eval(), 1.0)
    logits = bound.logit if isinstance(bound, hw.GumbelSigmoidGate) else bound.log_alpha
    before = bound(x)
    with torch.no_grad():
        logits.add_(shift)
    after = bound(x)
    assert all(few <= many for few, many in zip(chosen(before), chosen(after), strict=True))
    assert (after.weight >= before.weight).all()


@EXAMPLES
@given(low=st.floats(0.0, 6.0), high=st.floats(0.0, 6.0), least=st.integers(0, H), seed=seeds)
def test_a_higher_threshold_drops_more_heads_and_never_too_many(low, high, least, seed):
    torch.manual_seed(seed)
    x = 2 * torch.randn(3, 5, 12)
    found = []
    for threshold in sorted((low, high)):
        torch.manual_seed(seed)
        gate = hw.ThresholdGate(threshold, min_heads=least, resolution=2.0)
        layer = hw.MultiheadAttention(12, H, gate=gate, batch_first=True).eval()
        with torch.no_grad():
            layer.in_proj_weight.mul_(3.0)
        with hw.trace(layer) as trace, torch.no_grad():
            layer(x, x, x, need_weights=False)
        (selection,) = trace.selections.values()
        assert (selection.count >= least).all()
        found.append(chosen(selection))
    assert all(many >= few for many, few in zip(*found, strict=True))


@EXAMPLES
@given(keep=st.floats(0.01, 1.0), per_input=st.booleans(), seed=seeds)
def test_random_heads_are_exactly_as_many(keep, per_input, seed):
    bound, x, _ = random_gate(hw.RandomGate(keep, per_input=per_input), seed, 1.0)
    expected = min(max(math.floor(keep * H + 0.5), 1), H)
    for training in (True, False):
        assert bound.train(training)(x).count.tolist() == [expected] * 3


@EXAMPLES
@given(
    keep=st.floats(0.01, 1.0),
    seed=seeds,
    steps=st.integers(2, 12),
    asleep_by=st.sampled_from([0.0, 0.5]),
)
def test_as_many_heads_are_awake_as_the_schedule_says(keep, seed, steps, asleep_by):
    bound, x, _ = random_gate(
        hw.SleepGate(keep, scope="layer", every=1, asleep_by=asleep_by, settled_from=2.0), seed, 1.0
    )
    for step in range(steps):
        progress = step / (steps - 1)
        hw.anneal(bound, progress)
        (bound(x).weight * torch.rand(H)).sum().backward()
        if step > 0:
            ramp = min(1.0, float(torch.tensor(progress)) / asleep_by) if asleep_by else 1.0
            expected = math.floor((1 - (1 - keep) * ramp) * H + 0.5)
            assert bound.awake.sum().item() == min(max(expected, 1), H)
    moved = [move.event == "wakes" for move in bound.moves]
    assert H + sum(moved) - (len(moved) - sum(moved)) == bound.awake.sum().item()


@EXAMPLES
@given(shared=st.sets(st.integers(0, H - 1), max_size=H - 1), progress=unit, seed=seeds)
def test_shared_heads_are_always_there(shared, progress, seed):
    gate = hw.SharedHeadsGate(hw.BudgetGate(0.3), shared=sorted(shared))
    bound, x, padding = random_gate(gate, seed, 1.0)
    hw.anneal(bound.eval(), progress)
    selection = bound(x, padding)
    assert all(shared <= heads for heads in chosen(selection))
    assert (selection.weight[:, sorted(shared)] == 1).all()
    assert (selection.count >= len(shared) + 1).all()


@pytest.mark.parametrize("gate", DETERMINISTIC, ids=lambda gate: type(gate).__name__)
@EXAMPLES
@given(scale=st.sampled_from([0.0, 1.0]), dtype=st.sampled_from(DTYPES), padded=st.booleans())
def test_evaluation_in_one_pass_equals_the_operators_that_have_gradients(
    gate, scale, dtype, padded
):
    bound, x, padding = random_gate(gate, 0, scale, dtype)
    hw.anneal(bound.eval(), 1.0)
    mask = padding if padded else None
    composed = bound(x, mask)
    with torch.no_grad():
        alone = bound(x, mask)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    for part in ("relevance", "budget"):
        ours, theirs = getattr(alone, part), getattr(composed, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
