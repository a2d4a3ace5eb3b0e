"""The confidence-driven budget: who stops, who is widened, and what it costs."""

import math
from fractions import Fraction

import headwise as hw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planted import Planted
from torch import nn

ops = torch.ops.headwise


def test_confidence_by_its_definition():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [60.0, -60.0, -math.inf]]).double()
    p = logits.softmax(1)
    torch.testing.assert_close(ops.prediction_confidence(logits), p.amax(1))
    margin = ops.prediction_confidence(logits, "margin")
    torch.testing.assert_close(margin, p.sort(1).values[:, 2] - p.sort(1).values[:, 1])
    entropy = ops.prediction_confidence(logits, "entropy")
    by_hand = [1 + sum(v * math.log(v) for v in row if v > 0) / math.log(3) for row in p.tolist()]
    assert entropy.tolist() == pytest.approx(by_hand, abs=1e-12)
    with pytest.raises(ValueError, match="'margin' or 'entropy', got 'magic'"):
        ops.prediction_confidence(logits, "magic")
    with pytest.raises(ValueError, match="at least 2 classes"):
        ops.prediction_confidence(logits[:, :1])


def mean_cost(confidence, cost, threshold):
    total = 0.0
    for n in range(cost.size(1)):
        for stage in range(cost.size(0)):
            total += cost[stage, n].item()
            if stage + 1 < cost.size(0) and confidence[stage, n].item() >= threshold:
                break
    return total / cost.size(1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 1000), st.floats(0, 1))
def test_the_threshold_is_the_largest_that_the_limit_allows(stages, examples, seed, where):
    torch.manual_seed(seed)
    confidence = (torch.rand(stages - 1, examples) * 5).round().double() / 5
    cost = torch.randint(1, 9, (stages, examples)).double()
    least, most = mean_cost(confidence, cost, 0), mean_cost(confidence, cost, math.inf)
    limit = least + where * (most - least)
    found = ops.confidence_threshold(confidence, cost, limit)
    candidates = [*confidence.flatten().tolist(), math.inf]
    allowed = [t for t in candidates if mean_cost(confidence, cost, t) <= limit]
    assert found == max(allowed)


def changes(confidence, correct, threshold):
    """How many examples only the last stage gets right, and how many only the policy does."""
    lost = won = 0
    for n in range(correct.size(1)):
        stages = range(len(confidence))
        stage = next((s for s in stages if confidence[s, n] >= threshold), len(confidence))
        lost += bool(correct[-1, n] and not correct[stage, n])
        won += bool(correct[stage, n] and not correct[-1, n])
    return lost, won


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_the_threshold_that_keeps_the_accuracy(stages, examples, seed, loss):
    torch.manual_seed(seed)
    confidence = (torch.rand(stages - 1, examples) * 8).round().double() / 8
    correct = torch.rand(stages, examples) < 0.6
    found = ops.accurate_threshold(confidence, correct, loss)
    downwards = sorted({*confidence.flatten().tolist(), math.inf}, reverse=True)
    expected = math.inf
    for threshold in downwards[1:]:
        lost, won = changes(confidence, correct, threshold)
        if lost - won > loss * examples:
            break
        expected = threshold
    assert found == expected


@pytest.mark.parametrize("trials", [1, 2, 17, 60])
@pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.97])
def test_the_binomial_tail_is_exact(trials, probability):
    p = Fraction(probability)
    mass = [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1)]
    for k in range(-1, trials + 2):
        expected = float(sum(mass[: k + 1])) if k >= 0 else 0.0
        found = ops.binomial_tail(k, trials, probability)
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-300)
    # Closed: P(X = 0) = (1 - p)^n, also for numbers of examples where the masses are tiny.
    assert ops.binomial_tail(0, 100_000, 0.001) == pytest.approx(0.999**100_000, rel=1e-8)
    assert ops.binomial_tail(3, 5, 0.0) == 1.0 and ops.binomial_tail(3, 5, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        ops.binomial_tail(1, 2, 1.5)
    with pytest.raises(ValueError, match=r"trials must be in 0\.\.10000000, got 2147483648"):
        ops.binomial_tail(3, 2**31, 0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(40, 80), st.integers(0, 1000), st.sampled_from([0.5, 0.9]))
def test_learn_then_test(stages, examples, seed, certainty):
    """From infinity down a fixed grid; the first threshold whose p-value is too large ends it."""
    torch.manual_seed(seed)
    confidence = torch.rand(stages - 1, examples).double()
    correct = torch.rand(stages, examples) < 0.9
    found = ops.accurate_threshold(confidence, correct, 0.1, certainty)
    grid = [0.0, *(1 / (1 + math.exp(20 - 40 * i / 2000)) for i in range(2001)), math.inf]
    expected = math.inf
    for threshold in reversed(grid[:-1]):
        lost, _ = changes(confidence, correct, threshold)
        mass = [math.comb(examples, k) * 0.1**k * 0.9 ** (examples - k) for k in range(lost + 1)]
        if sum(mass) > 1 - certainty:
            break
        expected = threshold
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("examples", [50, 100, 300, 1000])
def test_certainty_is_a_bound_on_the_true_loss(examples):
    """Calibrated again and again: the true loss exceeds the limit in at most 5% of the runs.

    An input of confidence c is lost with probability 0.3 (1 - c) where it stops early, so a
    threshold t loses 0.15 (1 - t)^2 of all inputs.
    """
    torch.manual_seed(examples)
    limit, runs = 0.05, 400
    exceeded = {None: 0, 0.95: 0}
    thresholds = []
    for _ in range(runs):
        confidence = torch.rand(1, examples).double()
        early = torch.rand(examples) >= 0.3 * (1 - confidence[0])
        correct = torch.stack([early, torch.ones(examples).bool()])
        for certainty in exceeded:
            t = ops.accurate_threshold(confidence, correct, limit, certainty)
            exceeded[certainty] += 0.15 * (1 - min(t, 1.0)) ** 2 > limit
        thresholds.append(t)
    assert exceeded[0.95] <= 0.05 * runs + 2.5 * math.sqrt(0.05 * 0.95 * runs)
    assert exceeded[None] > 0.25 * runs  # that of the mean bounds nothing
    best = 1 - math.sqrt(limit / 0.15)
    if examples == 1000:  # and certainty does not cost much
        assert sorted(thresholds)[runs // 2] < best + 0.15
    if examples == 50:  # 0.95^50 = 0.077: nothing can be certain
        assert min(thresholds) == math.inf


def test_accurate_threshold_refusals():
    confidence, correct = torch.rand(1, 4).double(), torch.ones(2, 4).bool()
    for arguments, message in (
        ((confidence, correct, 1.5), r"loss must be in \[0, 1\], got 1.5"),
        ((confidence, correct, 0.1, 1.0), r"certainty must be in \(0, 1\), got 1"),
        ((confidence * math.nan, correct, 0.1), "confidence must be finite"),
        ((confidence, correct[:1], 0.1), r"confidence must be \[S - 1, N\] = \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.accurate_threshold(*arguments)


def test_threshold_refusals():
    confidence, cost = torch.rand(1, 4).double(), torch.full((2, 4), 3.0).double()
    for arguments, message in (
        ((confidence, cost, 2.0), "limit must be at least 3, what the first stage costs, got 2"),
        ((confidence, -cost, 2.0), "cost must not be negative"),
        ((confidence * math.nan, cost, 2.0), "must be finite"),
        ((confidence, cost[:1], 2.0), r"confidence must be \[S - 1, N\] = \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.confidence_threshold(*arguments)


class Sum(nn.Module):
    """Two classes; the margin of the second is what the heads add up to."""

    def __init__(self, *weights):
        super().__init__()
        self.sum = Planted(*weights)

    def forward(self, x):
        score = self.sum(x)
        return torch.stack([torch.zeros_like(score), score], 1)  # [B, 2]


RANKING = hw.HeadScores("mine", {"sum.layers.0": [4.0, 3.0, 2.0, 1.0]})


def easy_and_hard():
    """Head 0 is enough for the first two inputs; the others need head 1, then 2 and 3."""
    return torch.tensor(
        [[5.0, 0, 0, 0], [-5.0, 0, 0, 0], [0.5, -5.0, 0, 0], [0.2, 0.2, 3.0, 3.0]]
    ).double()


def test_inputs_stop_when_they_are_sure():
    model = Sum([1.0, 1.0, 1.0, 1.0])
    policy = hw.analysis.ConfidencePolicy(model, (0.25, 0.5, 1.0), 0.9, ranking=RANKING)
    found = policy.predict(easy_and_hard())
    assert found.stage.tolist() == [0, 0, 1, 2]
    assert found.heads.tolist() == [[1, 1, 1, 1], [0, 0, 2, 2], [0, 0, 0, 4]]
    assert found.total_heads.tolist() == [1, 1, 3, 7]
    assert found.logits[:, 1].tolist() == pytest.approx([5.0, -5.0, -4.5, 6.4])
    assert found.confidence[0, 3].item() == pytest.approx(1 / (1 + math.exp(-0.2)))
    assert found.confidence[1, 0].isnan() and not found.confidence[2, 3].isnan()
    assert found.reason(0) == "1 heads: confidence 0.99 >= 0.90, stopped"
    assert found.reason(3).startswith("1 heads: confidence 0.55 < 0.90, widened; 2 heads: ")
    assert found.reason(3).endswith("4 heads: confidence 1.00 >= 0.90, stopped")
    assert model.sum.layers[0].gate is None


def test_threshold_zero_and_infinity_are_the_first_and_last_stage():
    model, x = Sum([1.0, 1.0, 1.0, 1.0]), easy_and_hard()
    first = hw.analysis.ConfidencePolicy(model, (0.5, 1.0), 0.0, ranking=RANKING).predict(x)
    assert first.total_heads.tolist() == [2] * 4
    last = hw.analysis.ConfidencePolicy(model, (0.5, 1.0), math.inf, ranking=RANKING).predict(x)
    torch.testing.assert_close(last.logits, model(x))
    assert last.reason(0).endswith("the widest budget")


def test_a_fitted_threshold_keeps_to_its_heads():
    torch.manual_seed(0)
    model, x = Sum([1.0, 1.0, 1.0, 1.0]), torch.randn(200, 4, dtype=torch.float64)
    policy = hw.analysis.ConfidencePolicy(model, (0.25, 1.0), ranking=RANKING)
    before = -1.0
    for heads in (1.0, 2.5, 4.0, 5.0):
        threshold = policy.fit(x.split(60), heads)
        used = policy.predict(x).total_heads.double().mean().item()
        assert used <= heads and used > heads - 0.03
        assert threshold == policy.threshold > before
        before = threshold
    assert before == math.inf
    with pytest.raises(ValueError, match="limit must be at least 1, what the first stage costs"):
        policy.fit([x], 0.5)


def test_a_threshold_fitted_for_accuracy_saves_where_it_can():
    """Head 0 decides for most inputs; for a few, heads 1 to 3 overrule it."""
    torch.manual_seed(0)
    x = 0.05 * torch.randn(400, 4, dtype=torch.float64)
    x[:, 0] += 4.0 * torch.randn(400).sign()
    hard = torch.arange(400) % 8 == 0
    x[hard, 0] = 0.3
    x[hard, 1:] = -2.0
    model = Sum([1.0, 1.0, 1.0, 1.0])
    policy = hw.analysis.ConfidencePolicy(model, (0.25, 1.0), ranking=RANKING)
    with torch.no_grad():
        labels = model(x).argmax(1)
    found = policy.fit_accuracy(x.split(100), loss=0.0)
    assert found.accuracy == found.widest_accuracy == 1.0
    assert found.widest_heads == 4.0 and found.heads == pytest.approx(1 + 4 / 8) and found.pays
    assert policy.predict(x).total_heads.double().mean().item() == pytest.approx(found.heads)
    assert torch.equal(policy.predict(x).logits.argmax(1), labels)
    # All may be lost: every input stops at once.
    assert policy.fit_accuracy([x], lambda batch: labels, loss=1.0).heads == 1.0
    # With few inputs little is certain: nothing may stop, and the policy does not pay.
    few = torch.cat([x[hard][:1], x[~hard][:3]])
    unsure = policy.fit_accuracy([few], loss=0.01, certainty=0.95)
    assert unsure.heads == 5.0 and unsure.threshold == math.inf and not unsure.pays
    # ln 0.05 / ln 0.99 = 298.07: 299 inputs of which none is lost are enough.
    easy = x[~hard][:299]
    assert policy.fit_accuracy([easy[:298]], loss=0.01, certainty=0.95).heads == 5.0
    assert policy.fit_accuracy([easy], loss=0.01, certainty=0.95).heads == 1.0
    same = torch.zeros(8, 4, dtype=torch.float64)
    same[:, 1] = torch.tensor([-3.0, 3.0]).repeat(4)  # stage 0 knows nothing
    blind = policy.fit_accuracy([same], loss=0.0)
    assert blind.heads == 5.0 and not blind.pays and blind.threshold == math.inf
    for options, message in (
        (dict(certainty=1.2), r"certainty must be in \(0, 1\), got 1.2"),
        (dict(loss=-0.1), r"loss must be in \[0, 1\], got -0.1"),
        (dict(labels_fn=lambda batch: torch.rand(8)), r"labels must be whole numbers \[8\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.fit_accuracy([same], **options)
    with pytest.raises(ValueError, match="batches must not be empty"):
        policy.fit_accuracy([])


def test_any_gate_is_widened_by_its_own_relevance():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = hw.convert(encoder, hw.BudgetGate(budget=0.5))
            self.classify = nn.Linear(16, 3)

        def forward(self, x, key_padding_mask=None):
            return self.classify(self.encoder(x, src_key_padding_mask=key_padding_mask)[:, 0])

    model = Classifier().eval()
    for gate in (layer.gate for layer in hw.attention_layers(model).values()):
        nn.init.normal_(gate.base)
    batch = {"x": torch.randn(5, 6, 16), "key_padding_mask": torch.zeros(5, 6).bool()}
    found = hw.analysis.ConfidencePolicy(model, (0.5, 1.0, 2.0), math.inf).predict(batch)
    assert found.heads.tolist() == [[2] * 5, [4] * 5, [8] * 5]
    for layer in hw.attention_layers(model).values():
        assert not layer.gate._forward_hooks
    with torch.no_grad():  # twice half of the heads is all of them
        for layer in hw.attention_layers(model).values():
            layer.gate.eval()
            layer.set_gate(None)
        torch.testing.assert_close(found.logits, model(**batch), rtol=1e-4, atol=1e-5)
    for layer in hw.attention_layers(model).values():
        layer.set_gate(hw.BudgetGate(budget=0.5).eval())
    # In the middle the gates' own choice is untouched.
    own = hw.analysis.ConfidencePolicy(model, (1.0,)).predict(batch)
    with torch.no_grad():
        torch.testing.assert_close(own.logits, model(**batch), rtol=0, atol=0)


def test_widened_selections():
    from headwise.analysis.confidence import _widen

    relevance = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    selection = hw.Selection(
        torch.tensor([[1, 2, -1, -1], [0, -1, -1, -1], [-1] * 4]).int(),
        torch.tensor([2, 1, 0]).int(),
        torch.tensor([[0.0, 0.7, 0.4, 0.0], [0.2, 0, 0, 0], [0, 0, 0, 0]]),
        relevance,
    )
    wide = _widen(selection, 2.0, None, "a")
    assert wide.index.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [-1] * 4]
    assert wide.count.tolist() == [4, 2, 0]
    expected = torch.tensor([[1.0, 0.7, 0.4, 1.0], [0.2, 1.0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(wide.weight, expected)
    narrow = _widen(selection, 0.5, None, "a")
    assert narrow.count.tolist() == [1, 1, 0] and narrow.index[0].tolist() == [1, -1, -1, -1]


def test_policy_refusals():
    model, x = Sum([1.0, 1.0, 1.0, 1.0]), easy_and_hard()
    for options, message in (
        (dict(factors=(1.0, 0.5)), r"factors must be positive and ascending, got \[1, 0.5\]"),
        (dict(factors=()), "factors must be positive and ascending"),
        (dict(measure="magic"), "measure must be one of probability, .*, got 'magic'"),
        (dict(threshold=math.nan), "threshold must be a number"),
        (dict(ranking=None), "layer 'sum.layers.0' has no relevance of its own: ranking must"),
        (dict(ranking=hw.HeadScores("a", {"sum.layers.0": [1.0]})), "ranking must have 4 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            hw.analysis.ConfidencePolicy(model, **{"ranking": RANKING, **options})
    policy = hw.analysis.ConfidencePolicy(
        model, ranking=RANKING, forward_fn=lambda m, b: m(b)[:, 0]
    )
    with pytest.raises(ValueError, match=r"must return logits \[B, C\] of at least 2 classes"):
        policy.predict(x)
    policy = hw.analysis.ConfidencePolicy(model, ranking=RANKING, forward_fn=lambda m, b: m(b) / 0)
    with pytest.raises(ValueError, match="must return finite logits"):
        policy.predict(x)
    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.analysis.ConfidencePolicy(model, ranking=RANKING).fit([], 2.0)
    with pytest.raises(ValueError, match="model must have attention heads"):
        hw.analysis.ConfidencePolicy(nn.Linear(2, 2))
