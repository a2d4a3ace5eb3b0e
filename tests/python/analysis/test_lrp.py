"""Relevance of heads: conservation, closed forms, and the same rules written out by hand."""

import headwise as hw
import pytest
import torch
from support.architectures import bert
from support.planted import Planted
from torch import nn
from torch.nn import functional as F

D, H = 16, 4


def test_rules_by_their_definition():
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.ops.headwise.held_slope(x, F.gelu(x))
    torch.testing.assert_close(y, F.gelu(x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, F.gelu(x))  # all relevance goes to x
    norm = nn.LayerNorm(6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    y = torch.ops.headwise.held_layer_norm(x, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y, norm(x))
    to_x, to_bias = torch.autograd.grad(y.sum(), (x, norm.bias))
    total = (to_x * x).sum() + (to_bias * norm.bias).sum()
    torch.testing.assert_close(total, y.sum())
    context, gradient = torch.randn(2, 2, 3, 4, 5).double()
    context[1, :] = 0
    shares = torch.ops.headwise.relevance_shares(context, gradient)
    sums = [[(context[b, h] * gradient[b, h]).sum() for h in range(3)] for b in range(2)]
    assert shares[1].eq(0).all()
    for h in range(3):
        torch.testing.assert_close(shares[0, h], sums[0][h] / sum(abs(s) for s in sums[0]))


def test_a_linear_model_gives_each_head_what_it_adds():
    a, b = [1.0, -2.0, 0.0, 3.0], [0.5, 0.5, 1.0, 0.0]
    model = Planted(a, b)
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    found = hw.analysis.lrp_scores(model, [x[:4], x[4:]], lambda m, batch: m(batch))
    for name, weights in zip(hw.attention_layers(model), (a, b), strict=True):
        part = x * torch.tensor(weights, dtype=torch.float64)  # [B, H]
        expected = (part / part.abs().sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(found.scores.values[name], expected)
    assert found.conservation_error < 1e-12 and found.bias_share == 0
    assert found.scores.metric == "lrp"
    assert all(layer._probe is None for layer in model.layers)


class Classifier(nn.Module):
    def __init__(self, norm_first, activation):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            D, H, 24, 0.0, activation, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(D, 3)

    def forward(self, x, padding):
        return self.classify(self.encoder(x, src_key_padding_mask=padding).mean(1))


def by_hand(model, x, padding):
    """Relevance of the last layer's heads [B, H] in a post-norm encoder, rules written out.

    Returns it with the explained logits [B] and the relevance of everything at that depth [B]: the
    heads, the residual stream beside them, and the biases after.
    """
    first, last = model.encoder.layers
    x = first(x, src_key_padding_mask=padding).detach()  # [B, L, D]
    attention = last.self_attn
    b, length, _ = x.shape
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(b, length, H, D // H).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / (D // H) ** 0.5
    weights = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
    context = (weights @ v).detach().requires_grad_()  # [B, H, L, d]
    residual = x.clone().requires_grad_()
    out = context.transpose(1, 2).reshape(b, length, D)
    z = residual + F.linear(out, attention.out_proj.weight, attention.out_proj.bias)

    def norm(t, module):
        scale = ((t - t.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + module.eps).sqrt()
        return (t - t.mean(-1, keepdim=True)) / scale.detach() * module.weight + module.bias

    z = norm(z, last.norm1)
    hidden = F.linear(z, last.linear1.weight, last.linear1.bias)
    open_ = (F.gelu(hidden) / hidden).detach()
    z = norm(z + F.linear(hidden * open_, last.linear2.weight, last.linear2.bias), last.norm2)
    logits = model.classify(z.mean(1)).amax(1)  # [B]
    to_context, to_residual = torch.autograd.grad(logits.sum(), (context, residual))
    return (context * to_context).sum((2, 3)), logits, (residual * to_residual).sum((1, 2))


def test_the_last_layer_by_hand():
    torch.manual_seed(0)
    model = Classifier(False, "gelu").double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(5, 6, D, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([[6], [3], [4], [6], [2]])
    relevance, _, _ = by_hand(model, x, padding)
    found = hw.analysis.lrp_scores(model, [(x, padding)], lambda m, batch: m(*batch))
    expected = (relevance / relevance.abs().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(list(found.scores.values.values())[1], expected)
    assert found.conservation_error < 1e-12


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_relevance_is_conserved(norm_first, activation):
    torch.manual_seed(0)
    model = hw.convert(Classifier(norm_first, activation).double())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    model.requires_grad_(False)
    x = torch.randn(4, 6, D, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([[6], [3], [4], [1]])
    found = hw.analysis.lrp_scores(model, [(x, padding)], lambda m, batch: m(*batch))
    assert found.conservation_error < 1e-12
    assert abs(found.bias_share) > 1e-3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    # A plain model gives the same; so does another scale of the last layer.
    with torch.no_grad():
        model.classify.weight.mul_(3)
        model.classify.bias.mul_(3)
    scaled = hw.analysis.lrp_scores(model, [(x, padding)], lambda m, batch: m(*batch))
    for name, values in found.scores.values.items():
        torch.testing.assert_close(scaled.scores.values[name], values)
        assert values.abs().sum() <= 1 + 1e-12


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu"])
def test_relevance_is_conserved_in_bert(activation):
    model = bert("BertForSequenceClassification", num_labels=3, hidden_act=activation).double()
    ids = torch.randint(1, 50, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()

    def logits(model, batch):
        return model(input_ids=batch[0], attention_mask=batch[1]).logits

    found = hw.analysis.lrp_scores(model, [(ids, mask)], logits)
    assert found.conservation_error < 1e-10
    assert len(found.scores.values) == 2
    dynamic = hw.convert(model, hw.FixedGate(scale=[1.0, 0.0, 0.5, 2.0]))
    gated = hw.analysis.lrp_scores(dynamic, [(ids, mask)], logits)
    assert gated.conservation_error < 1e-10
    assert all(values[1] == 0 for values in gated.scores.values.values())


class Squares(nn.Module):
    """An operation without a rule."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1).pow(2)


def test_what_the_rules_do_not_know_shows_in_the_error():
    found = hw.analysis.lrp_scores(hw.convert(Squares()), [torch.randn(2, 3, 8)], lambda m, b: m(b))
    assert found.conservation_error == pytest.approx(1.0, rel=1e-4)  # a square counts twice


def test_relevance_refusals():
    model, x = Planted([1.0, 2.0]), torch.ones(3, 2, dtype=torch.float64)
    cases = [
        ([], lambda m, b: m(b), "batches must not be empty"),
        ([x], lambda m, b: b[:, 0], "forward_fn must run model"),
        ([x], lambda m, b: m(b).detach(), "outputs that depend on the heads"),
        ([x], lambda m, b: m(b) * 0, "the outputs do not depend on the heads"),
        ([x], lambda m, b: m(b) / 0, "finite logits, got NaN or infinity"),
        ([x], lambda m, b: m(b).sum(), r"one value per example \[B\], got shape \(\)"),
    ]
    for batches, output, message in cases:
        with pytest.raises(ValueError, match=message):
            hw.analysis.lrp_scores(model, batches, output)
