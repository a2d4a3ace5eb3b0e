"""The grouped route, which CUDA devices take, on the CPU: every case of test_attention_ops."""

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import test_attention_ops as cases
import torch
from test_attention_ops import (  # noqa: F401  (collected again, on the grouped operators)
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

ops = torch.ops.headwise
MASKS = [None, None, False, 0.0, None, None]  # the defaults of the last arguments
MASK_NAMES = ["key_padding_mask", "attn_mask", "is_causal", "dropout_p", "dropout_seed", "scale"]


def function(operators, prefix, name, leading, defaults, needs, saved):
    """An autograd function out of operators.{prefix}{name}_forward and _backward.

    leading: positional arguments before the masks; defaults: of the last of these.
    needs: which of all arguments have gradients, in the order of the backward operator.
    saved: which results of forward it wants.
    """
    forward_op = getattr(operators, f"{prefix}{name}_forward")
    backward_op = getattr(operators, f"{prefix}{name}_backward")

    class Executor(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = forward_op(*arguments)
            ctx.arguments, ctx.results = arguments, results[saved:]
            return results[0]

        @staticmethod
        def backward(ctx, grad_output):
            wanted = [ctx.needs_input_grad[i] for i in needs]
            gradients = backward_op(grad_output, *ctx.arguments, *ctx.results, wanted)
            result = [None] * len(ctx.arguments)
            for i, wants, gradient in zip(needs, wanted, gradients, strict=True):
                if wants:
                    assert gradient.shape == ctx.arguments[i].shape
                    result[i] = gradient
            return tuple(result)

    def call(*arguments, **options):
        arguments = [*arguments, *defaults[len(defaults) - leading + len(arguments) :]]
        assert len(arguments) == leading
        masks = [options.get(n, d) for n, d in zip(MASK_NAMES, MASKS, strict=True)]
        padding, mask = masks[:2]
        if padding is not None and padding.requires_grad:
            # As the Autograd kernel does: what wants a gradient travels as an attention mask.
            rows = padding[:, None, None]
            if mask is not None:
                rows = rows + cases.oracle.additive(mask, rows.dtype)
            masks[:2] = [None, rows]
        return Executor.apply(*arguments, *masks)

    return call


class Executors:
    """The attention operators by the forward and backward operators of one executor."""

    def __init__(self, operators, prefix=""):
        def make(*arguments):
            return function(operators, prefix, *arguments)

        self.selected_self_attention = make("self_attention", 9, [], [0, 1, 2, 3, 4, 8, 10], 1)
        self.selected_multihead_attention = make(
            "multihead_attention",
            18,
            [None, None, False],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 16, 19],
            1,
        )
        self.selected_attention = make("attention", 6, [None], [0, 1, 2, 5, 7], 0)


GroupedOps = Executors(ops, "_grouped_")


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    monkeypatch.setattr(cases, "ops", GroupedOps)


def test_more_pairs_than_a_cuda_grid_takes_at_once():
    batch = 2**15
    q, k, v = (torch.randn(batch, 3, 2, 2, dtype=torch.float64) for _ in range(3))
    index = torch.arange(3, dtype=torch.int32).repeat(batch, 1)
    count = torch.randint(0, 4, (batch,), dtype=torch.int32)
    count[-100:] = 3
    y = GroupedOps.selected_attention(q, k, v, index, count)
    torch.testing.assert_close(y, ops.selected_attention(q, k, v, index, count))


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_the_mask_of_the_cpu(p):
    """One seed means one mask, whatever executes the selection: outputs and gradients agree."""
    rand = cases.Random(1, torch.float64)
    x, weights = rand(2, 7, 6), cases.layer_weights(rand, 3, 4, 6)
    index, count, weight = rand.selection(2, 3, count=[2, 3])
    options = {"dropout_p": p, "dropout_seed": torch.tensor([12])}
    results = []
    for operator in (ops.selected_self_attention, GroupedOps.selected_self_attention):
        y = operator(x, *weights, 3, index, count, weight, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights, weight])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
