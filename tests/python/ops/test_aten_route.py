"""The ATen route, which CUDA devices take, on the CPU: every case of the attention operators."""

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch
from support import attention_cases as cases
from support.attention_cases import (  # noqa: F401  (collected again, on its operators)
    test_core_attention,
    test_heads_never_chosen_get_exactly_no_gradient,
    test_long_keys_take_several_tiles,
    test_multihead_attention,
    test_no_heads_give_the_output_bias,
    test_random_shapes,
    test_self_attention,
    test_tiny_sizes,
    test_what_was_not_chosen_is_not_read,
)
from support.executors import Executors

ops = torch.ops.headwise


AtenOps = Executors(ops, "_aten_")


@pytest.fixture(autouse=True)
def aten(monkeypatch):
    monkeypatch.setattr(cases, "ops", AtenOps)


def test_more_pairs_than_a_cuda_grid_takes_at_once():
    batch = 2**15
    q, k, v = (torch.randn(batch, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    index = torch.arange(3, dtype=torch.int32).repeat(batch, 1)
    count = torch.randint(0, 4, (batch,), dtype=torch.int32)
    count[-100:] = 3
    y = AtenOps.selected_attention(q, k, v, index, count)
    torch.testing.assert_close(y, ops.selected_attention(q, k, v, index, count))


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_the_mask_of_the_cpu(p):
    """One seed means one mask, whatever executes the selection: outputs and gradients agree."""
    rand = cases.Random(1, torch.float64)
    x, weights = rand(2, 7, 6), cases.layer_weights(rand, 3, 4, 6)
    index, count, weight = rand.selection(2, 3, count=[2, 3])
    options = {"dropout_p": p, "dropout_seed": torch.tensor([12])}
    results = []
    for operator in (ops.selected_self_attention, AtenOps.selected_self_attention):
        y = operator(x, *weights, 3, index, count, weight, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights, weight])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
