"""Masks that are added to attention scores mark the same padding as boolean ones, for all that
leaves padding out."""

import headwise as hw
import pytest
import torch
from headwise.gates.bank import router_features
from headwise.gates.padding import is_padding
from torch import nn

PADDING = torch.tensor([[False] * 6, [False] * 2 + [True] * 4, [True] * 3 + [False] * 3])
ADDED = {
    "-inf": torch.zeros(PADDING.shape).masked_fill(PADDING, -torch.inf),
    "least": torch.zeros(PADDING.shape).masked_fill(PADDING, torch.finfo(torch.float32).min),
    "biased": torch.full(PADDING.shape, 0.5).masked_fill(PADDING, -1e4),
}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x, mask):
        return x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hw.convert(Reader().eval())


def batches(mask):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 6, 16, generator=generator), mask) for _ in range(4)]


def loss_fn(model, batch):
    return model(*batch)[~PADDING].square().mean()


def forward_fn(model, batch):
    return model(*batch)[~PADDING]


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_added_masks_mark_the_same_padding(kind, dtype):
    assert torch.equal(is_padding(ADDED[kind].to(dtype)), PADDING)
    assert is_padding(PADDING) is PADDING


@pytest.mark.parametrize("kind", ADDED)
def test_a_router_reads_the_same_tokens(kind):
    x = torch.randn(3, 6, 16)
    features = ("mean", "first", "max")
    expected = router_features(x, PADDING, features)
    torch.testing.assert_close(router_features(x, ADDED[kind], features), expected)


@pytest.mark.parametrize("kind", ADDED)
def test_analyses_and_pruning_leave_out_the_same_tokens(model, kind):
    def measured(mask):
        given = batches(mask)
        alike = hw.analysis.head_similarity(model, given, forward_fn)
        found = hw.pruning.kwon_prune(model, given, loss_fn, macs=0.5, tune=False)
        plan = hw.HeadPlan([hw.pruning.LayerPlan("attention", 4, [1, 2])])
        small = hw.prune(model, plan, repair=given, forward_fn=forward_fn)
        repaired = small.attention.out_proj.weight
        return alike.tokens, alike.matrix, found.report["examples_tokens"], repaired

    tokens, matrix, length, weight = measured(PADDING)
    actual = measured(ADDED[kind])
    assert (tokens, length) == (actual[0], actual[2]) == (44, pytest.approx(11 / 3))
    torch.testing.assert_close(actual[1], matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[3], weight, rtol=1e-3, atol=1e-4)
