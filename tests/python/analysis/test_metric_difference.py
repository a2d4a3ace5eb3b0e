"""Any metric over paired resamples, against the bootstrap of means and a metric known by hand."""

from __future__ import annotations

import headwise as hw
import pytest
import torch
from headwise.analysis import metric_difference


def accuracy(outputs, targets):
    return (outputs == targets).double().mean()


def f1(outputs, targets):
    right = ((outputs == 1) & (targets == 1)).sum()
    return 2 * right / ((outputs == 1).sum() + (targets == 1).sum())


def answers(count=400, seed=0):
    """Two models of which the first is right more often."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (count,), generator=generator)
    noise = torch.rand(2, count, generator=generator)
    first, second = (
        torch.where(own < wrong, 1 - targets, targets)
        for own, wrong in zip(noise, (0.1, 0.25), strict=True)
    )
    return first, second, targets


def test_of_a_mean_it_is_the_bootstrap_of_means():
    first, second, targets = answers()
    found = metric_difference(accuracy, first, second, targets, resamples=2000)
    difference = ((first == targets).double() - (second == targets).double())[None]
    mean, low, high, p = torch.ops.headwise.paired_bootstrap(difference, 2000, 0, 0.95)
    assert found.difference == pytest.approx(mean.item(), abs=1e-12)
    # Draws of their own: the ends agree as far as 2,000 draws tell.
    assert found.low == pytest.approx(low.item(), abs=0.006)
    assert found.high == pytest.approx(high.item(), abs=0.006)
    assert found.p_value == p.item() == pytest.approx(2 / 2001)


def test_f1():
    first, second, targets = answers()
    found = metric_difference(f1, first, second, targets)
    assert (found.first, found.second) == (float(f1(first, targets)), float(f1(second, targets)))
    assert found.low < found.difference == found.first - found.second < found.high
    again = metric_difference(f1, first, second, targets)
    assert again == found != metric_difference(f1, first, second, targets, seed=1)
    other = metric_difference(f1, second, first, targets)
    assert (other.difference, other.low, other.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )
    narrow = metric_difference(f1, first, second, targets, confidence_level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_examples_are_paired():
    """Two models that are wrong together do not differ, however few the examples."""
    first, _, targets = answers(30)
    found = metric_difference(f1, first, first.clone(), targets)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_coverage():
    """95% intervals hold the true difference about that often (here of the recall: 0.9 - 0.75)."""

    def recall(outputs, targets):
        return (outputs[targets == 1] == 1).double().mean()

    inside = 0
    for seed in range(120):
        found = metric_difference(recall, *answers(200, seed), resamples=200)
        inside += found.low <= 0.15 <= found.high
    assert 105 <= inside <= 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resamples": 0}, r"resamples must be in 1\.\.10000000, got 0"),
        ({"resamples": 10**12}, r"resamples must be in 1\.\.10000000, got 1000000000000"),
        ({"confidence_level": 1.0}, r"confidence_level must be in \(0, 1\), got 1.0"),
        ({"second": torch.zeros(3)}, "of the same examples, at least one, got 400, 3 and 400"),
        ({"metric": lambda *_: float("nan")}, "metric must be finite on every resample"),
    ],
)
def test_refusals(changes, message):
    first, second, targets = answers()
    arguments = {"metric": f1, "first": first, "second": second, "targets": targets, **changes}
    with pytest.raises(ValueError, match=message):
        metric_difference(**arguments)
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        metric_difference(f1, first[:0], second[:0], targets[:0])
    assert hw.analysis.MetricDifference.__module__ == "headwise.analysis.bootstrap"
