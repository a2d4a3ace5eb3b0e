"""Head scores against plain formulas worked out here."""

import math

import headwise as hw
import pytest
import torch
from torch import nn
from torch.nn import functional as F

D, H, LAYERS = 16, 4, 2


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.classify = nn.Linear(D, 3)

    def forward(self, x, padding=None):
        return self.classify(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hw.convert(Encoder().double())


@pytest.fixture
def data():
    torch.manual_seed(1)
    lengths = torch.tensor([7, 3, 5, 1, 6, 4])
    return (
        torch.randn(6, 7, D, dtype=torch.float64),
        torch.arange(7) >= lengths[:, None],  # [B, L], True = padding
        torch.randint(3, (6,)),
    )


def losses(model, batch):
    x, padding, labels = batch
    return F.cross_entropy(model(x, padding), labels, reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


def split(data, *sizes):
    return list(zip(*(part.split(sizes) for part in data), strict=True))


def attention_maps(layer, x, padding):
    """float64 [B, H, L, L], from the definition."""
    b, length, _ = x.shape
    q, k, _ = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k = (t.view(b, length, H, D // H).transpose(1, 2) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / math.sqrt(D // H)
    return scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)


def gate_derivatives(model, data, step=1e-5):
    """dL_b / dxi_h of every head [layer][B, H], by central differences on gates that multiply."""
    found = {}
    for name, layer in hw.attention_layers(model).items():
        columns = []
        for head in range(H):
            values = []
            for sign in (1, -1):
                scale = [1.0] * H
                scale[head] += sign * step
                layer.set_gate(hw.FixedGate(scale=scale))
                with torch.no_grad():
                    values.append(losses(model.eval(), data))
            columns.append((values[0] - values[1]) / (2 * step))
        layer.set_gate(None)
        found[name] = torch.stack(columns, -1)
    return found


@pytest.mark.parametrize("absolute", ["per_example", "per_batch"])
def test_michel_is_the_derivative_by_a_gate(model, data, absolute):
    expected = gate_derivatives(model, data)
    scores = hw.score_heads(model, [data], losses, absolute=absolute, normalize=False)["michel"]
    for name, d in expected.items():
        mean = d.abs().mean(0) if absolute == "per_example" else d.mean(0).abs()
        torch.testing.assert_close(scores.values[name], mean, rtol=1e-5, atol=1e-9)


def test_michel_per_token(model, data):
    contexts = {}

    def keep(name, layer, probe):
        probe.context.retain_grad()
        contexts[name] = probe.context

    with hw.nn.instrument(model) as opened:
        opened.probe(keep)
        losses(model, data).sum().backward()
    scores = hw.score_heads(model, [data], losses, normalize=False)["michel"]
    real = ~data[1]
    for name, context in contexts.items():
        s = (context * context.grad).sum(-1) * real[:, None]  # [B, H, L]
        torch.testing.assert_close(scores.values[name], s.abs().sum((0, 2)).detach() / real.sum())


def test_normalisation_is_by_layer(model, data):
    scores = hw.score_heads(model, [data], losses)["michel"]
    for values in scores.values.values():
        torch.testing.assert_close(values.norm(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("loss_fn", [losses, mean_loss])
@pytest.mark.parametrize("absolute", ["per_token", "per_example"])
def test_scores_do_not_depend_on_batches(model, data, absolute, loss_fn):
    options = dict(absolute=absolute, metrics=["michel", "entropy", "attention_confidence", "hies"])
    whole = hw.score_heads(model, [data], losses, **options)
    parts = hw.score_heads(model, split(data, 1, 3, 2), loss_fn, **options)
    for metric in whole:
        for name in whole[metric].values:
            torch.testing.assert_close(parts[metric].values[name], whole[metric].values[name])


def test_entropy_and_confidence_follow_their_definition(model, data):
    x, padding, _ = data
    first = next(iter(hw.attention_layers(model).values()))
    maps = attention_maps(first, x, padding)
    visible = (~padding).sum(-1)  # [B]
    entropy = -torch.xlogy(maps, maps).sum(-1) / visible.clamp(min=2).log()[:, None, None]
    real = (~padding)[:, None].double()
    by_example = (entropy * real).sum(-1) / real.sum(-1)
    confidence = (maps.amax(-1) * real).sum(-1) / real.sum(-1)
    scores = hw.score_heads(model, [data], losses, ["entropy", "attention_confidence"])
    name = next(iter(hw.attention_layers(model)))
    torch.testing.assert_close(scores["entropy"].values[name], by_example.mean(0).detach())
    torch.testing.assert_close(
        scores["attention_confidence"].values[name], confidence.mean(0).detach()
    )


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_hies_combines_scaled_parts(scope):
    importance = hw.HeadScores("michel", {"a": [1.0, 3.0], "b": [2.0, 5.0]})
    entropy = hw.HeadScores("entropy", {"a": [0.2, 0.4], "b": [0.9, 0.7]})
    made = hw.pruning.hies(importance, entropy, alpha=0.25, scope=scope)
    if scope == "layer":
        expected = {"a": [0.75 * 1, 0.25 + 0.0], "b": [0.0, 0.25 + 0.75]}
    else:
        expected = {
            "a": [0.75, 0.25 * 0.5 + 0.75 * (1 - 0.2 / 0.7)],
            "b": [0.25 * 0.25, 0.25 + 0.75 * (1 - 0.5 / 0.7)],
        }
    for name, values in expected.items():
        torch.testing.assert_close(made.values[name], torch.tensor(values, dtype=torch.float64))


def test_the_model_is_left_as_it_was(model, data):
    model.train()
    model.classify.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fails(model, batch):
        losses(model, batch)
        raise KeyError("mine")

    hw.score_heads(model, [data], losses, ["michel", "hies"])
    with pytest.raises(KeyError, match="mine"):
        hw.score_heads(model, [data], fails)
    assert model.training and not model.classify.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
    assert all(layer._probe is None for layer in hw.attention_layers(model).values())


def test_a_frozen_model_and_a_plain_one_give_the_same(model, data):
    expected = hw.score_heads(model, [data], losses)["michel"]
    model.requires_grad_(False)
    frozen = hw.score_heads(model, [data], losses)["michel"]
    torch.manual_seed(0)
    plain = hw.score_heads(Encoder().double(), [data], losses)["michel"]
    for name in expected.values:
        torch.testing.assert_close(frozen.values[name], expected.values[name])
        torch.testing.assert_close(plain.values[name], expected.values[name])


def test_padding_of_keys_is_not_padding_of_other_queries():
    torch.manual_seed(0)
    mha = hw.convert(nn.MultiheadAttention(D, H, batch_first=True).double())
    q, k = torch.randn(2, 3, 5, D, dtype=torch.float64)  # as many queries as keys
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]  # [B, S]

    def loss(model, batch):
        return model(q, k, k, key_padding_mask=padding, need_weights=False)[0].square().sum((1, 2))

    scores = hw.score_heads(mha, [None], loss, normalize=False)["michel"]
    contexts = []

    def keep(name, layer, probe):
        probe.context.retain_grad()
        contexts.append(probe.context)

    with hw.nn.instrument(mha) as opened:
        opened.probe(keep)
        loss(mha, None).sum().backward()
    s = (contexts[0] * contexts[0].grad).sum(-1).detach()  # [B, H, L]
    expected = s.abs().sum((0, 2)) / (3 * 5)
    torch.testing.assert_close(next(iter(scores.values.values())), expected)


def test_bad_input_is_named(model, data):
    def nan(model, batch):
        return losses(model, batch) * float("nan")

    def constant(model, batch):
        model(batch[0], batch[1])
        return torch.zeros((), dtype=torch.float64, requires_grad=True)

    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.score_heads(model, [], losses)
    with pytest.raises(ValueError, match="must return a finite loss"):
        hw.score_heads(model, [data], nan)
    with pytest.raises(ValueError, match="the loss does not depend on the heads"):
        hw.score_heads(model, [data], constant)
    with pytest.raises(ValueError, match="metrics must be of .* got 'magic'"):
        hw.score_heads(model, [data], losses, ["magic"])
    with pytest.raises(ValueError, match="alpha must be in"):
        hw.score_heads(model, [data], losses, alpha=1.5)
    with pytest.raises(ValueError, match="one loss per example"):
        hw.score_heads(model, [data], lambda m, batch: m(batch[0], batch[1]))


def test_json_round_trip_and_refusals():
    scores = hw.HeadScores("michel", {"a": [0.25, 1e-17], "b": [3.0]})
    again = hw.HeadScores.from_json(scores.to_json())
    assert again.metric == "michel" and list(again.values) == ["a", "b"]
    assert all(torch.equal(again.values[n], scores.values[n]) for n in again.values)
    assert again.ranking() == [("b", 0), ("a", 0), ("a", 1)]
    with pytest.raises(ValueError, match='unknown key "extra"'):
        hw.HeadScores.from_json(scores.to_json().replace('"metric"', '"extra": 1, "metric"'))
    with pytest.raises(ValueError, match='scores must have "version": 1'):
        hw.HeadScores.from_json(scores.to_json().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="scores is not valid JSON"):
        hw.HeadScores.from_json("{")
