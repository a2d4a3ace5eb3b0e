"""The attention operators made of the forward and backward operators of one executor."""

import torch

from support import oracle

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
            # As the Autograd kernel does: a mask that requires a gradient is passed as an attention
            # mask.
            rows = padding[:, None, None]
            if mask is not None:
                rows = rows + oracle.additive(mask, rows.dtype)
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
