"""Calls of the attention operators with small inputs, for the checks of torch."""

import headwise  # noqa: F401  (registers torch.ops.headwise)
import torch

from support import oracle

ops = torch.ops.headwise


def self_arguments(dtype=torch.float64, batch=2, length=5):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    index, count, weight = oracle.random_selection(batch, 3, g, dtype=dtype, count=2)
    arguments = (rand(batch, length, 6), rand(18, 6), rand(18), rand(6, 6), rand(6), 3)
    return (*arguments, index, count, weight.requires_grad_())


def multihead_arguments(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    index, count, weight = oracle.random_selection(2, 3, g, dtype=dtype, count=2)
    return (
        rand(2, 5, 6), rand(2, 4, 3), rand(2, 4, 2), rand(6, 6), rand(6, 3), rand(6, 2),
        rand(6), rand(6), rand(6), rand(6, 6), rand(6), 3, index, count, weight.requires_grad_(),
        rand(6), rand(6), True,
    )  # fmt: skip


def core_arguments(dtype=torch.float64):
    g = torch.Generator().manual_seed(2)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    index, count, weight = oracle.random_selection(2, 4, g, dtype=dtype, count=2)
    q, k, v = rand(2, 4, 5, 3), rand(2, 2, 6, 3), rand(2, 2, 6, 4)
    return q, k, v, index, count, weight.requires_grad_()


def float_mask(queries, keys):
    return torch.randn(queries, keys, dtype=torch.float64).requires_grad_()


PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
CASES = {
    "self": (ops.selected_self_attention, self_arguments(), {}),
    "self masked": (
        ops.selected_self_attention,
        self_arguments(),
        {"key_padding_mask": PADDING, "attn_mask": float_mask(5, 5), "is_causal": True},
    ),
    "self dropout": (
        ops.selected_self_attention,
        self_arguments(),
        {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    ),
    "multihead": (ops.selected_multihead_attention, multihead_arguments(), {}),
    "core": (ops.selected_attention, core_arguments(), {}),
    "core masked": (ops.selected_attention, core_arguments(), {"attn_mask": float_mask(5, 6)}),
    "core plain": (ops.selected_attention, core_arguments()[:5], {}),
}
