"""The bootstrap, rank correlations, CKA and second-order effects against their definitions."""

import math

import headwise  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.headwise
f64 = torch.float64


def test_bootstrap_of_many_examples_is_normal_theory():
    torch.manual_seed(0)
    differences = torch.randn(3, 900, dtype=f64) * 2 + torch.tensor([[0.0], [0.3], [-1.0]])
    mean, low, high, p = ops.paired_bootstrap(differences, 4000, 1, 0.9)
    error = differences.std(1) / 30
    torch.testing.assert_close(mean, differences.mean(1))
    torch.testing.assert_close(high - mean, 1.6449 * error, rtol=0.06, atol=0)
    torch.testing.assert_close(mean - low, 1.6449 * error, rtol=0.06, atol=0)
    expected = 2 * (1 - torch.distributions.Normal(0.0, 1.0).cdf((mean / error).abs().float()))
    torch.testing.assert_close(p, expected.double(), rtol=0.1, atol=0.02)


def test_bootstrap_of_two_examples_is_enumeration():
    # Means of the four equally likely resamples of (1, -3): 1, -1, -1, -3.
    mean, low, high, p = ops.paired_bootstrap(torch.tensor([[1.0, -3.0]], dtype=f64), 20000, 3)
    assert (mean.item(), low.item(), high.item()) == (-1.0, -3.0, 1.0)
    assert abs(p.item() - 0.5) < 0.02


def test_bootstrap_is_symmetric_and_repeatable():
    torch.manual_seed(1)
    d = torch.randn(4, 37, dtype=f64) + 0.2
    mean, low, high, p = ops.paired_bootstrap(d, 500, 7)
    for one, two in zip(ops.paired_bootstrap(-d, 500, 7), (-mean, -high, -low, p), strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(ops.paired_bootstrap(d, 500, 7)[3], p)
    assert not torch.equal(ops.paired_bootstrap(d, 500, 8)[1], low)
    always = ops.paired_bootstrap(d.abs() + 1, 99)[3]
    assert torch.equal(always, torch.full((4,), 2 / 100, dtype=f64))
    assert ops.paired_bootstrap(torch.zeros(1, 5, dtype=f64))[3].item() == 1


def average_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def spearman(a, b):
    a, b = average_ranks(a), average_ranks(b)
    mean = (len(a) + 1) / 2
    ab = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return ab / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def kendall(a, b):
    def sign(x):
        return (x > 0) - (x < 0)

    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    both = sum(sign(a[i] - a[j]) * sign(b[i] - b[j]) for i, j in pairs)
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (a, b)]
    return both / math.sqrt(untied[0] * untied[1])


VECTOR = st.lists(st.integers(-4, 4), min_size=9, max_size=9).filter(lambda v: len(set(v)) > 1)


@settings(max_examples=60, deadline=None)
@given(VECTOR, VECTOR)
def test_rank_correlations_follow_their_definition(a, b):
    scores = torch.tensor([a, b], dtype=f64)
    for method, reference in (("spearman", spearman), ("kendall", kendall)):
        value, low, high = ops.rank_agreement(scores, method, 1)
        assert value[0, 1].item() == pytest.approx(reference(a, b), abs=1e-12)
        assert torch.equal(value, value.T) and torch.equal(value.diag(), torch.ones(2).double())


def test_agreement_has_intervals():
    torch.manual_seed(0)
    common = torch.randn(60, dtype=f64)
    scores = torch.stack([common, common.exp(), -common, torch.randn(60, dtype=f64)])
    for method in ("spearman", "kendall"):
        value, low, high = ops.rank_agreement(scores, method, 400, 5)
        assert value[0, 1] == 1 and low[0, 1] == 1  # ranks do not see exp
        assert value[0, 2] == -1 and high[0, 2] == -1
        assert (low <= value + 1e-12).all() and (value <= high + 1e-12).all()
        assert low[0, 3] < 0 < high[0, 3]
        again = ops.rank_agreement(scores, method, 400, 5)
        assert torch.equal(torch.stack(again), torch.stack([value, low, high]))
    # Fisher's standard error of a rank correlation near 0 is about 1 / sqrt(n - 3).
    _, low, high = ops.rank_agreement(scores[[0, 3]], "spearman", 2000)
    assert high[0, 1] - low[0, 1] == pytest.approx(2 * 1.96 / math.sqrt(57), rel=0.25)


def gram_cka(x, y):
    """From centred Gram matrices: <KHLH> / (|HKH| |HLH|)."""
    n = len(x)
    centre = torch.eye(n, dtype=f64) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return (k * m).sum() / (k.norm() * m.norm())


def test_cka_equals_its_gram_form_and_its_invariances():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5, dtype=f64), torch.randn(30, 3, dtype=f64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=f64)).Q
    outputs = [x, y, 3 * x @ rotation + 7, torch.full((30, 2), 0.1, dtype=f64)]
    cka = ops.linear_cka(outputs)
    torch.testing.assert_close(cka[0, 1], gram_cka(x, y))
    torch.testing.assert_close(cka[0, 2], torch.tensor(1.0, dtype=f64))
    torch.testing.assert_close(cka[1, 2], cka[0, 1])
    assert torch.equal(cka, cka.T) and torch.equal(cka.diag(), torch.ones(4).double())
    assert (cka[3, :3] == 0).all()  # a constant is like nothing


def test_second_order_effect_and_its_error():
    torch.manual_seed(0)
    full, one, two, both = torch.randn(50, dtype=f64), *torch.randn(3, 2, 50, dtype=f64)
    effect, error = ops.second_order_effect(full, one, two, both)
    for p in range(2):
        values = [(both[p, n] - full[n]) - (one[p, n] - full[n]) - (two[p, n] - full[n])
                  for n in range(50)]  # fmt: skip
        mean = sum(values) / 50
        variance = sum((v - mean) ** 2 for v in values) / 49
        torch.testing.assert_close(effect[p], mean)
        torch.testing.assert_close(error[p], (variance / 50).sqrt())
    swapped = ops.second_order_effect(full, two, one, both)
    torch.testing.assert_close(swapped, (effect, error))
    assert ops.second_order_effect(full[:1], one[:, :1], two[:, :1], both[:, :1])[1].eq(0).all()


def test_bad_input_is_named():
    good = torch.randn(2, 5, dtype=f64)
    nan = good.clone()
    nan[0, 0] = math.nan
    cases = [
        (lambda: ops.paired_bootstrap(good[0]), r"differences must be \[M, N\]"),
        (lambda: ops.paired_bootstrap(good[:, :0]), "at least one example"),
        (lambda: ops.paired_bootstrap(nan), "differences must be finite"),
        (lambda: ops.paired_bootstrap(good, 0), "resamples must be in 1..10000000, got 0"),
        (
            lambda: ops.paired_bootstrap(good, 9, 0, 1.0),
            r"confidence_level must be in \(0, 1\), got 1",
        ),
        (lambda: ops.rank_agreement(good, "pearson"), "'spearman' or 'kendall', got 'pearson'"),
        (lambda: ops.rank_agreement(good[:, :1]), "at least 2 heads"),
        (lambda: ops.rank_agreement(nan), "scores must be finite"),
        (lambda: ops.rank_agreement(good * 0), "scores must not be all the same"),
        (lambda: ops.linear_cka([good, good[:1]]), "at least 2 rows"),
        (lambda: ops.linear_cka([good, good.new_ones(3, 1)]), "the same rows, got 2 and 3"),
        (lambda: ops.linear_cka([nan]), "outputs must be finite"),
        (lambda: ops.second_order_effect(good[0], good, good, good[:1]), "the shape of first"),
        (lambda: ops.second_order_effect(good[0, :0], good, good, good), "at least one example"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
