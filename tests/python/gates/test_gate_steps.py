"""The steps of a gate as one operator on a CPU: the same numbers and derivatives as by ATen's
operators, which a functional transform runs, and few calls."""

from __future__ import annotations

import itertools

import headwise as hw
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.headwise
B, D, H, HIDDEN = 5, 24, 7, 9
SHAPES = ((1, 1), (B, H), (3, 40))


def check(function, inputs: tuple[Tensor, ...], exact: int = 0, **tolerance) -> None:
    """``function`` returns differentiable tensors and, as its last ``exact`` ones, others."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    got = function(*leaves)
    parts = len(got) - exact

    def split(*arguments):
        found = function(*arguments)
        return found[:parts], found[parts:]

    want, pull, others = torch.func.vjp(split, *(t.detach() for t in inputs), has_aux=True)
    for mine, theirs in zip(got, (*want, *others), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)
    cotangents = tuple(torch.randn_like(t) for t in want)
    kept = [(t, c) for t, c in zip(got[:parts], cotangents, strict=True) if t.requires_grad]
    found = [None] * len(leaves)
    if kept:
        outputs, given = zip(*kept, strict=True)
        found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    used = {id(t) for t, _ in kept}
    applied = tuple(
        c if id(t) in used else torch.zeros_like(c)
        for t, c in zip(got[:parts], cotangents, strict=True)
    )
    for mine, theirs in zip(found, pull(applied), strict=True):
        mine = torch.zeros_like(theirs) if mine is None else mine
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, **tolerance)


def close(dtype) -> dict:
    return {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}


PHASES = (0.0, 0.3, 0.7, 0.75, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("progress", PHASES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_budget_select(dtype, progress, training, shape):
    torch.manual_seed(0)
    batch, heads = shape
    now, noise = torch.tensor(progress), torch.randn(batch, heads).to(dtype)
    for run_all, straight, soft, rounding, drawn in itertools.product(
        (False, True), (False, True), (False, True), ("round", "ceil"), (None, noise)
    ):
        if soft and not training:
            continue  # its derivative is that of the operators

        def choose(relevance, budget, run_all=run_all, straight=straight, soft=soft,
                   rounding=rounding, drawn=drawn):  # fmt: skip
            index, count, weight, expected = ops.budget_select(
                relevance, budget, now, drawn, training, run_all, 0.5, 0.1, 0.5, 0.75, straight,
                soft, 1, rounding,
            )  # fmt: skip
            return weight, expected, index, count

        relevance = torch.randn(batch, heads, dtype=dtype)
        budget = torch.rand(batch, dtype=dtype) * 0.85 + 0.05
        if batch > 1:
            budget[0] = 1.0
        check(choose, (relevance, budget), exact=2, **close(dtype))


@pytest.mark.parametrize("mass", [0.0, 1e-3, 1.0, 3.0, 5.5, 6.0, 6.999, 7.0, 9.0])
@pytest.mark.parametrize("tau", [0.02, 0.5, 30.0])
def test_weights_sum_to_the_mass(mass, tau):
    """Also where the sum is flat in the threshold: cold, and a whole number of heads."""
    scores = torch.linspace(-3, 3, 7).repeat(2, 1).requires_grad_()
    budget = torch.full((2,), mass / 7).requires_grad_()
    _, _, weight, _ = ops.budget_select(
        scores, budget, torch.tensor(0.0), None, True, False, tau, tau, 0.0, 0.75, False, False, 0,
        "round",
    )  # fmt: skip
    torch.testing.assert_close(
        weight.sum(1), torch.full((2,), min(mass, 7.0)), atol=1e-5, rtol=1e-5
    )
    want = ops.soft_top_k(scores.detach(), budget.detach() * 7, torch.tensor(tau))
    torch.testing.assert_close(weight.detach(), want, atol=1e-5, rtol=1e-4)
    weight.square().sum().backward()
    assert torch.isfinite(scores.grad).all() and torch.isfinite(budget.grad).all()


def test_gradcheck_of_a_soft_choice():
    torch.manual_seed(0)
    relevance = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    budget = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)

    def choose(relevance, budget):
        return ops.budget_select(
            relevance, budget, torch.tensor(0.4), None, True, True, 0.5, 0.1, 0.0, 0.8, False,
            False, 1, "round",
        )[2:]  # fmt: skip

    assert torch.autograd.gradcheck(choose, (relevance, budget))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("progress", PHASES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weight_one", [False, True])
def test_hard_concrete_select(dtype, progress, training, weight_one):
    torch.manual_seed(0)
    now = torch.tensor(progress)
    draws = (None, torch.rand(1, H).to(dtype), torch.rand(B, H).to(dtype))
    for run_all, uniform in itertools.product((False, True), draws):

        def choose(log_alpha, run_all=run_all, uniform=uniform):
            index, count, weight, expected = ops.hard_concrete_select(
                log_alpha, uniform, now, training, run_all, 0.75, 0.33, -0.1, 1.1, weight_one
            )
            return weight, expected, index, count

        check(choose, (2 * torch.randn(B, H, dtype=dtype),), exact=2, **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("progress", PHASES)
@pytest.mark.parametrize("training", [False, True])
def test_gumbel_sigmoid_select(dtype, progress, training):
    torch.manual_seed(0)
    now = torch.tensor(progress)
    for run_all, uniform in itertools.product((False, True), (None, torch.rand(B, H).to(dtype))):

        def choose(logits, run_all=run_all, uniform=uniform):
            index, count, weight, expected = ops.gumbel_sigmoid_select(
                logits, uniform, now, training, run_all, 0.75, 0.7
            )
            return weight, expected, index, count

        check(choose, (torch.randn(B, H, dtype=dtype),), exact=2, **close(dtype))


@pytest.mark.parametrize("features_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("progress", [0.1, 0.4, 0.8])
def test_relevance_and_budget(features_dtype, dtype, training, progress):
    torch.manual_seed(0)
    now, features = torch.tensor(progress), torch.randn(B, D, dtype=features_dtype)

    def relevance(base, weight):
        return (ops.input_relevance(features, base, weight, now, training, 0.4),)

    def budget(*network):
        return ops.head_budget(features, *network, now, training, 0.3, 0.6, 0.5, 0.9, 0.5, 0.4)

    tolerance = close(torch.float32) if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    check(relevance, (torch.randn(H).to(dtype), torch.randn(H, D).to(dtype)), **tolerance)
    network = (torch.randn(HIDDEN, D), torch.randn(HIDDEN), torch.randn(1, HIDDEN), torch.randn(1))
    check(budget, tuple(t.to(dtype) for t in network), **tolerance)


@pytest.mark.parametrize("bounds", [(0.2, 0.7), (0.1, 1.0), (0.4, 0.4), (0.8, 0.3)])
def test_budget_bounds(bounds):
    asked = torch.linspace(0.05, 0.95, 11, dtype=torch.float64)
    check(lambda asked: (ops.budget_bounds(asked, *bounds),), (asked,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "boolean", "added"])
def test_learn_features(dtype, kept, padding):
    torch.manual_seed(0)
    length = 300  # more than one task adds up
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def statistics():
        return torch.zeros(D, dtype=kept), torch.ones(D, dtype=kept), torch.zeros(())

    mine, theirs = statistics(), statistics()
    mask = None
    if padding is not None:
        mask = torch.arange(length) >= torch.randint(0, length, (B, 1))
        if padding == "added":
            mask = torch.zeros(B, length).masked_fill(mask, -torch.inf)
    for step in range(3):
        x = torch.randn(length, B, D).to(dtype).transpose(0, 1) * (step + 1) + step
        got = ops.learn_features(x.requires_grad_(), mask, *mine)
        pooled = ops.gate_features(x.to(wide), mask)
        ops.update_statistics(ops.feature_moments(pooled), *theirs)
        want = ops.standardize(pooled, *theirs[:2])
        assert got.dtype == wide and not got.requires_grad
        narrow = torch.bfloat16 in (kept, dtype)
        tolerance = {"rtol": 4e-2, "atol": 4e-2} if narrow else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(got, want, **tolerance)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_teaches_nothing(value):
    statistics = (torch.zeros(D), torch.ones(D), torch.tensor(3.0))
    before = [t.clone() for t in statistics]
    x = torch.randn(B, 4, D)
    x[1, 2, 3] = value
    ops.learn_features(x, None, *statistics)
    ops.learn_features(x[:0], None, *statistics)
    assert all(torch.equal(a, b) for a, b in zip(statistics, before, strict=True))


def test_scores_that_are_not_finite_are_named():
    scores, now = torch.zeros(2, 4), torch.tensor(0.0)
    scores[1, 2] = torch.nan
    message = "relevance must be finite, got nan at row 1, head 2"
    with pytest.raises(ValueError, match=message):
        ops.hard_concrete_select(scores, None, now, True, True, 0.5, 0.33, -0.1, 1.1, False)
    with pytest.raises(ValueError, match=message):
        ops.gumbel_sigmoid_select(scores, None, now, True, True, 0.5, 0.7)
    budget = torch.full((2,), 0.5)

    def choose(scores, budget):
        return ops.budget_select(
            scores, budget, now, None, True, True, 0.5, 0.1, 0.5, 0.7, False, False, 1, "round"
        )

    with pytest.raises(ValueError, match=message):
        choose(scores, budget)
    budget[1] = torch.nan
    with pytest.raises(ValueError, match="relevance must be finite, got nan at row 1, head 0"):
        choose(torch.zeros(2, 4), budget)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("gate", "training", "evaluation"),
    [
        (hw.BudgetGate(budget=0.5), 24, 1),
        (hw.BudgetGate(), 40, 1),
        (hw.HardConcreteGate(input_dependent=True), 18, 3),
        (hw.GumbelSigmoidGate(), 18, 3),
    ],
)
def test_a_gate_is_few_operators(gate, training, evaluation):
    """Their number is the cost of a gate: a training step was 72 to 313 of them."""
    gate, x = gate.bind(D, H), torch.randn(B, 4, D)
    with Count() as step:
        selection = gate(x)
        selection.weight.sum().backward()
    assert step.calls <= training
    gate.eval()
    with torch.no_grad(), Count() as step:
        gate(x)
    assert step.calls <= evaluation


def test_changing_progress_before_the_backward_is_allowed():
    gate, x = hw.BudgetGate().bind(D, H), torch.randn(B, 4, D)
    gate.anneal(0.5)
    weight = gate(x).weight
    gate.anneal(0.6)
    weight.sum().backward()
    assert gate.base.grad is not None


@pytest.mark.parametrize("gate", [hw.BudgetGate(), hw.HardConcreteGate(input_dependent=True)])
def test_autocast_leaves_a_gate_in_float32(gate):
    torch.manual_seed(0)
    gate, x = gate.bind(D, H), torch.randn(B, 4, D)
    gate.anneal(0.9)
    torch.nn.init.normal_(gate.relevance.weight)
    gradients = []
    for enabled in (False, True):
        gate._reset_features()
        gate.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            selection = gate(x)
            (selection.weight.float().sum() + selection.relevance.square().sum()).backward()
        gradients.append((selection.relevance.detach(), gate.relevance.weight.grad.clone()))
    for plain, cast in zip(*gradients, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain)
