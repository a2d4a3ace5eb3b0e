"""Models in which it is known what every head is worth."""

from __future__ import annotations

import headwise as hw
import torch
from torch import nn


class Planted(nn.Module):
    """y = sum over layers and heads of a[layer][head] * x[head], exactly.

    Sequences have one token, so attention has no effect; head h passes on feature h of its input,
    and the output projection multiplies it by a[layer][h].
    """

    def __init__(self, *weights: list[float]):
        super().__init__()
        heads = len(weights[0])
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(heads, heads, bias=False, batch_first=True).double()
            for _ in weights
        )
        with torch.no_grad():
            for layer, row in zip(self.layers, weights, strict=True):
                layer.in_proj_weight.zero_()
                layer.in_proj_weight[2 * heads :].copy_(torch.eye(heads))
                layer.out_proj.weight.zero_()
                layer.out_proj.weight[0].copy_(torch.tensor(row))

    def forward(self, x):  # [B, H] -> [B]
        x = x[:, None]  # [B, 1, H]
        return sum(layer(x, x, x, need_weights=False)[0][:, 0, 0] for layer in self.layers)


def outputs(weights, x, without=()):
    """[B]: the output of ``Planted(*weights)`` without some (layer, head)."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for layer, row in enumerate(weights):
        for head, weight in enumerate(row):
            if (layer, head) not in without:
                total = total + weight * x[:, head]
    return total


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square()  # [B]


def logistic(model, batch):
    return torch.nn.functional.softplus(-model(batch[0]))  # [B]
