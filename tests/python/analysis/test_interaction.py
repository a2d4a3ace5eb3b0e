"""Interactions, similarity, agreement and the choice of alpha on models where they are known."""

import headwise as hw
import pytest
import torch
from support.planted import Planted, outputs, squared
from torch import nn

NAME = "layers.0"


def hinge(model, batch):
    return (1 - model(batch[0])).clamp(min=0)  # [B]


def test_heads_that_stand_in_for_each_other_are_found():
    # Either of 0 and 1 is enough; 2 does half of what is needed with 3's other half; 4 is idle.
    model = Planted([1.0, 1.0, 0.0, 0.0, 0.0])
    x = torch.ones(6, 5, dtype=torch.float64)
    found = hw.analysis.head_interactions(model, [(x, None)], hinge, pairs=1000)
    assert len(found.pairs) == 10
    assert found.substitutes() == [((NAME, 0), (NAME, 1), 1.0)]
    assert found.effect.count_nonzero() == 1 and found.standard_error.eq(0).all()
    assert found.single == {(NAME, head): 0.0 for head in range(5)}


def test_heads_that_need_each_other_have_a_negative_effect():
    model = Planted([0.5, 0.5, 1.0])
    x = torch.ones(4, 3, dtype=torch.float64)

    def loss(model, batch):  # nothing is gained before the sum is 1
        return (model(batch[0]) < 1.99).double()

    found = hw.analysis.head_interactions(model, [(x, None)], loss, pairs=[((NAME, 0), (NAME, 1))])
    assert found.effect.tolist() == [-1.0]  # 1 - 1 - 1
    assert found.substitutes() == []


def test_effects_and_errors_are_those_of_the_losses(tmp_path):
    weights = ([1.0, -0.5, 2.0], [0.3, 1.0, -1.0])
    torch.manual_seed(0)
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    model = Planted(*weights)
    found = hw.analysis.head_interactions(model, [(x, y)], squared, pairs=7, seed=3)
    parts = [(x[:9], y[:9]), (x[9:], y[9:])]
    path = tmp_path / "pairs"
    again = hw.analysis.head_interactions(model, parts, squared, 7, seed=3, journal=path)
    assert len(found.pairs) == len(set(found.pairs)) == 7 and found.pairs == again.pairs
    torch.testing.assert_close(found.effect, again.effect)

    def loss(*without):
        heads = {(int(name[-1]), head) for name, head in without}
        return (outputs(weights, x, heads) - y).square()

    for pair, effect, error in zip(found.pairs, found.effect, found.standard_error, strict=True):
        value = loss(*pair) - loss(pair[0]) - loss(pair[1]) + loss()
        torch.testing.assert_close(effect, value.mean())
        torch.testing.assert_close(error, value.std() / 30**0.5)
        # Squared errors: exactly 2 a_i a_j E[x_i x_j].
        (i, a), (j, b) = ((h, weights[int(n[-1])][h]) for n, h in pair)
        torch.testing.assert_close(effect, 2 * a * b * (x[:, i] * x[:, j]).mean())

    def never(model, batch):
        raise AssertionError("everything is in the journal but the whole model")

    calls = []

    def once(model, batch):
        calls.append(1)
        return squared(model, batch) if len(calls) <= 2 else never(model, batch)

    kept = hw.analysis.head_interactions(model, parts, once, 7, seed=3, journal=path)
    assert torch.equal(kept.effect, again.effect)


def test_pairs_of_one_layer():
    model = Planted([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    found = hw.analysis.head_interactions(model, [(x, y)], squared, within_layer=True)
    assert len(found.pairs) == 6 and all(one[0] == other[0] for one, other in found.pairs)


def test_pairs_across_layers_are_refused_within_layers():
    model, x = Planted([1.0], [2.0]), torch.ones(4, 1, dtype=torch.float64)
    across = [(("layers.0", 0), ("layers.1", 0))]
    with pytest.raises(ValueError, match="pairs must be of heads of one layer with within_layer"):
        hw.analysis.head_interactions(model, [(x, None)], hinge, across, within_layer=True)


def test_interaction_refusals():
    model, data = Planted([1.0, 2.0]), (torch.ones(2, 2).double(), torch.ones(2).double())
    cases = [
        (dict(pairs=0), "pairs must be positive, got 0"),
        (dict(pairs=[]), "pairs must not be empty"),
        (dict(pairs=[0, 1]), "pairs must be a number, or pairs of heads"),
        (dict(pairs=[((NAME, 0), (NAME, 5))]), r"the model's heads \(layer, head\), got \('lay"),
        (dict(pairs=[((NAME, 0), (NAME, 0))]), "two different heads"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            hw.analysis.head_interactions(model, [data], squared, **options)
    with pytest.raises(ValueError, match="the loss does not depend on the heads of these pairs"):
        hw.analysis.head_interactions(model, [data], lambda m, b: b[1])
    with pytest.raises(ValueError, match="at least two heads to pair"):
        hw.analysis.head_interactions(Planted([1.0]), [(data[0][:, :1], data[1])], squared)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def encoder_with_a_copy():
    """Head 2 of the first layer has the output of head 0, in another basis."""
    torch.manual_seed(0)
    model = hw.convert(Encoder().double())
    layer = next(iter(hw.attention_layers(model).values()))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    with torch.no_grad():
        q, k, v = layer.in_proj_weight.view(3, 4, 4, 16)
        q[2], k[2], v[2] = q[0], k[0], rotation @ v[0]
        layer.in_proj_bias.zero_()
    return model


def gram_cka(x, y):
    """From centred Gram matrices."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    return (k * m).sum() / (k.norm() * m.norm())


def test_similarity_finds_a_copied_head():
    model = encoder_with_a_copy()
    x = torch.randn(12, 7, 16, dtype=torch.float64)
    padding = torch.arange(7) >= torch.randint(2, 8, (12, 1))
    contexts = {}
    with torch.no_grad(), hw.nn.instrument(model) as opened:
        opened.probe(lambda name, layer, probe: contexts.update({name: probe.context}))
        model(x, padding)

    batches = [(x[:5], padding[:5]), (x[5:], padding[5:])]
    found = hw.analysis.head_similarity(model, batches, lambda m, b: m(*b))
    real = ~padding
    assert found.tokens == real.sum()
    tokens = [
        h for c in contexts.values() for h in c.transpose(0, 1)[:, real.flatten().view(12, 7)]
    ]
    for i in range(8):
        for j in range(8):
            torch.testing.assert_close(found.matrix[i, j], gram_cka(tokens[i], tokens[j]))
    first = next(iter(hw.attention_layers(model)))
    assert found.most_similar(1)[0][:2] == ((first, 0), (first, 2))
    assert found.matrix[0, 2] > 1 - 1e-9

    drawn = hw.analysis.head_similarity(model, batches, lambda m, b: m(*b), max_tokens=20, seed=1)
    assert drawn.tokens == 20 and drawn.matrix[0, 2] > 1 - 1e-9
    assert not torch.equal(drawn.matrix, found.matrix)


def test_the_draw_of_tokens_is_uniform():
    from headwise.analysis.interaction import _TokenSample

    hits = torch.zeros(40)
    for seed in range(300):
        sample = _TokenSample(10, seed)
        for part in torch.arange(40.0).split(13):
            sample._batch["a"] = part[:, None, None]
            sample.end_batch()
        hits[sample.kept["a"].flatten().long()] += 1
    assert hits.sum() == 3000  # ten different ones each time
    assert (hits - 75).abs().max() < 5 * 75**0.5


def test_similarity_refusals():
    model = hw.convert(Encoder())
    with pytest.raises(ValueError, match="batches must have at least two tokens, got 1"):
        hw.analysis.head_similarity(model, [torch.randn(1, 1, 16)], lambda m, b: m(b))
    with pytest.raises(ValueError, match="batches must have at least two tokens, got 0"):
        hw.analysis.head_similarity(model, [], lambda m, b: m(b))
    with pytest.raises(ValueError, match="forward_fn must run model"):
        hw.analysis.head_similarity(model, [torch.randn(1, 3, 16)], lambda m, b: b)
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        hw.analysis.head_similarity(model, [], lambda m, b: m(b), max_tokens=1)
    with pytest.raises(ValueError, match="must see the same tokens to be compared, got 3 in 'one'"):
        hw.analysis.head_similarity(hw.convert(Two()), [torch.randn(1, 4, 16)], lambda m, b: m(b))


class Two(nn.Module):
    """The second layer is asked about fewer tokens than the first."""

    def __init__(self):
        super().__init__()
        self.all = nn.MultiheadAttention(16, 4, batch_first=True)
        self.one = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        x = self.all(x, x, x)[0]
        return self.one(x[:, :3], x, x)[0]


def scores(metric, *layers):
    return hw.HeadScores(metric, {f"layer.{i}": values for i, values in enumerate(layers)})


def test_agreement_of_scores():
    one = scores("michel", [0.1, 0.9, 0.3], [0.2, 0.8])
    same = scores("michel", [1.0, 9.0, 3.0], [2.0, 8.0])
    other = scores("entropy", [0.9, 0.1, 0.7], [0.8, 0.2])
    found = hw.analysis.score_agreement({"seed 0": one, "seed 1": same, "entropy": other})
    assert found.labels == ["seed 0", "seed 1", "entropy"]
    torch.testing.assert_close(found.value[0], torch.tensor([1.0, 1.0, -1.0]).double())
    assert "1.00 [1.00, 1.00]" in found.table() and "-1.00 [-1.00, -1.00]" in found.table()
    # Swapping neighbours in a ranking of five: rho = 1 - 6 * 2 / (5 * 24), tau = 1 - 2 / 10.
    swapped = scores("michel", [0.2, 0.9, 0.3], [0.1, 0.8])
    for method, value in (("spearman", 0.9), ("kendall", 0.8)):
        found = hw.analysis.score_agreement({"a": one, "b": swapped}, method)
        assert found.value[0, 1].item() == pytest.approx(value)
        assert found.low[0, 1] <= value <= found.high[0, 1] + 1e-12
    with pytest.raises(ValueError, match="scores must be at least two, got 1"):
        hw.analysis.score_agreement({"a": one})
    with pytest.raises(ValueError, match="scores must be of the same heads, got others in 'b'"):
        hw.analysis.score_agreement({"a": one, "b": scores("michel", [0.1, 0.2], [0.3])})
    with pytest.raises(ValueError, match="method must be 'spearman' or 'kendall', got 'pearson'"):
        hw.analysis.score_agreement({"a": one, "b": same}, "pearson")


def test_alpha_is_the_best_on_held_out_data():
    importance = scores("michel", [0.9, 0.5, 0.1, 0.0])
    entropy = scores("entropy", [1.0, 0.5, 0.0, 0.6])
    # On held-out data heads 1 and 2 are the ones: each of the others adds 1 to the loss.
    model, data = Planted([1.0, 0.0, 0.0, 1.0]).train(), [torch.ones(2, 4, dtype=torch.float64)]
    importance, entropy = (
        hw.HeadScores(s.metric, {"layers.0": s.values["layer.0"]}) for s in (importance, entropy)
    )
    runs = []

    def loss_fn(model, batch):
        assert not model.training
        runs.append(model.layers[0].num_heads)
        return model(batch)

    found = hw.pruning.select_alpha(model, data, loss_fn, importance, entropy, keep=0.5)
    # alpha * importance + (1 - alpha) * (1 - entropy), by hand: 0 gives [2, 1], 1 gives [0, 1].
    expected = {}
    for step in range(11):
        alpha = step / 10
        value = [
            alpha * i / 0.9 + (1 - alpha) * (1 - e)
            for i, e in zip([0.9, 0.5, 0.1, 0.0], [1.0, 0.5, 0.0, 0.6], strict=True)
        ]
        heads = sorted(sorted(range(4), key=lambda h: -value[h])[:2])
        expected[alpha] = len(set(heads) - {1, 2})
    assert dict(found.values) == pytest.approx(expected)
    assert found.alpha == max(a for a, v in expected.items() if v == 0)
    assert found.plan.layers[0].heads == [1, 2]
    assert {0.0, 1.0} <= found.values.keys()  # entropy alone and importance alone are candidates
    for heads, metric in (([0, 1], importance), ([1, 2], entropy)):
        assert hw.plan(metric, 0.5).layers[0].heads == heads
    plans = {tuple(hw.plan(hw.pruning.hies(importance, entropy, a / 10), 0.5).layers[0].heads)
             for a in range(11)}  # fmt: skip
    assert runs == [2] * len(plans)  # each plan once
    assert model.training and model.layers[0].num_heads == 4
    torch.testing.assert_close(
        found.scores.values["layers.0"],
        hw.pruning.hies(importance, entropy, found.alpha).values["layers.0"],
    )
    with pytest.raises(ValueError, match="alphas must not be empty"):
        hw.pruning.select_alpha(model, data, loss_fn, importance, entropy, alphas=[])
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        hw.pruning.select_alpha(model, data, loss_fn, importance, entropy, alphas=[2.0])
    with pytest.raises(ValueError, match="loss_fn must return a finite loss, got NaN or infinity"):
        hw.pruning.select_alpha(
            model, data, lambda m, b: m(b) / 0, importance, entropy, alphas=[0.5]
        )
