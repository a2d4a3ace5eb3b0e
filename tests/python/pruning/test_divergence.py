"""Divergence scores against differences of the divergence itself."""

import copy

import headwise as hw
import pytest
import torch
from headwise.pruning import divergence_scores
from support.architectures import EMBED, HEADS, decoder_config
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    def __init__(self, layers=2, gate=None):
        super().__init__()
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(EMBED, HEADS, batch_first=True, gate=gate) for _ in range(layers)
        )
        self.head = nn.Linear(EMBED, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def tokens(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x)  # [B, L, 5]

    def forward(self, x):
        return self.tokens(x).mean(1)


def batches_of(count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 6, EMBED, generator=generator, dtype=dtype) for _ in range(count)]


def divergences(model, x, forward, weights):
    """``[B]``, from layers that are scaled by hand: weights [layers, H]."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        whole = forward(model, x).log_softmax(-1)
        for layer, weight in zip(scaled.layers, weights, strict=True):
            layer.out_proj.weight.mul_(weight.repeat_interleave(EMBED // HEADS))
        moved = forward(scaled, x).log_softmax(-1)
    each = F.kl_div(moved, whole, reduction="none", log_target=True).sum(-1)
    return each if each.dim() == 1 else each.mean(1)


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("per_token", [False, True])
def test_scores_are_differences_of_the_divergence(weight, per_token):
    torch.manual_seed(0)
    model, batches = Classifier().double(), batches_of()

    def forward(model, x):
        return model.tokens(x) if per_token else model(x)

    step, importance = 1e-6, []
    for x in batches:
        moved = torch.zeros(len(x), 2, HEADS, dtype=torch.float64)
        for layer in range(2):
            for head in range(HEADS):
                weights = torch.full((2, HEADS), weight, dtype=torch.float64)
                weights[layer, head] += step
                up = divergences(model, x, forward, weights)
                weights[layer, head] -= 2 * step
                moved[:, layer, head] = (divergences(model, x, forward, weights) - up) / (2 * step)
        importance.append(moved / moved.abs().sum((1, 2), keepdim=True))
    expected = torch.cat(importance).mean(0)
    scores = divergence_scores(model, batches, forward_fn=forward, weight=weight)
    assert scores.metric == "divergence"
    actual = torch.stack(list(scores.values.values()))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_each_input_counts_the_same_however_it_is_batched():
    torch.manual_seed(0)
    model, (x,) = Classifier().double(), batches_of(1)
    whole = divergence_scores(model, [x])
    parts = divergence_scores(model, [x[:1], x[1:]])
    for name, values in whole.values.items():
        torch.testing.assert_close(parts.values[name], values)


def test_a_head_that_writes_nothing_has_no_score():
    torch.manual_seed(0)
    model = Classifier().double()
    with torch.no_grad():
        model.layers[1].out_proj.weight[:, : EMBED // HEADS] = 0.0
    scores = divergence_scores(model, batches_of())
    assert scores.values["layers.1"][0] == 0.0
    assert int((scores.values["layers.1"] != 0).sum()) == HEADS - 1


def test_the_model_is_as_it_was():
    torch.manual_seed(0)
    model = Classifier().double().train()
    before = copy.deepcopy(model.state_dict())
    divergence_scores(model, batches_of())
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_heads_that_a_gate_leaves_out_score_nothing():
    torch.manual_seed(0)
    model = Classifier(gate=hw.FixedGate([0, 2])).double()
    scores = divergence_scores(model, batches_of())
    for values in scores.values.values():
        assert values[1] == values[3] == 0.0 and bool((values[[0, 2]] != 0).all())


def test_a_decoder_that_was_not_converted():
    import transformers

    torch.manual_seed(0)
    config = decoder_config(num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 40, (2, 9))} for _ in range(2)]
    scores = divergence_scores(model, batches)
    assert [len(values) for values in scores.values.values()] == [4, 4]
    total = sum(values.abs().sum() for values in scores.values.values())
    assert 0 < float(total) <= 1 + 1e-6
    assert sum(len(entry.heads) for entry in hw.plan(scores, keep=0.5).layers) == 4


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches must not be empty"),
        (batches_of(), {"weight": 1.0}, r"weight must be in \(0, 1\), got 1.0"),
        (batches_of(), {"weight": float("nan")}, r"weight must be in \(0, 1\)"),
        ([torch.full((2, 3, EMBED), torch.nan).double()], {}, "finite logits"),
        (batches_of(), {"forward_fn": lambda model, x: model(x).argmax(-1)}, "must return logits"),
        (batches_of(), {"forward_fn": lambda model, x: "text"}, "must return logits"),
        (batches_of(), {"forward_fn": lambda model, x: x[:, 0]}, "depend on the model's heads"),
        (batches_of(), {"forward_fn": lambda model, x: model(x)[:1]}, "one row of logits per"),
    ],
)
def test_wrong_input_is_refused(batches, options, message):
    with pytest.raises(ValueError, match=message):
        divergence_scores(Classifier().double(), batches, **options)
