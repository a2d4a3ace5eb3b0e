"""One attention layer in the forms that are timed against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwise as hw

#: Largest error over the largest value of the float64 reference.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}


class CheckFailed(RuntimeError):
    """A contender does not compute the right result."""


@dataclass(frozen=True)
class Shape:
    """Of a layer's input: B sequences of L tokens, width D, H heads."""

    batch: int
    length: int
    width: int
    heads: int

    def __str__(self) -> str:
        return f"{self.batch},{self.length},{self.width},{self.heads}"

    def as_list(self) -> list[int]:
        return [self.batch, self.length, self.width, self.heads]


@dataclass(frozen=True)
class Weights:
    """in_weight [3E, D], in_bias [3E], out_weight [D, E], out_bias [D] of ``heads`` heads."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    heads: int

    def tensors(self) -> list[Tensor]:
        return [self.in_weight, self.in_bias, self.out_weight, self.out_bias]

    def to(self, dtype: torch.dtype) -> Weights:
        first, second, third, fourth = (t.detach().to(dtype) for t in self.tensors())
        return Weights(first, second, third, fourth, self.heads)

    def first(self, heads: int) -> Weights:
        """The layer that physically has only the first ``heads`` heads."""
        width = self.out_weight.size(1)  # E
        kept = torch.arange(heads * (width // self.heads), device=self.in_weight.device)
        rows = torch.cat([kept + part * width for part in range(3)])
        return Weights(
            self.in_weight.detach()[rows],
            self.in_bias.detach()[rows],
            self.out_weight.detach()[:, kept].contiguous(),
            self.out_bias.detach().clone(),
            heads,
        )


def dense(x: Tensor, w: Weights, mask: Tensor | None = None) -> Tensor:
    """The layer of all heads that ``w`` has; ``mask``, [B, H] or [B, L, H], multiplies the heads'
    outputs.

    With a mask it is the oracle, and what MoH (arXiv 2410.11842) runs: mask after computing.
    """
    q, k, v = (
        part.unflatten(2, (w.heads, -1)).transpose(1, 2)  # [B, H, L, d]
        for part in F.linear(x, w.in_weight, w.in_bias).chunk(3, dim=2)
    )
    context = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, d]
    if mask is not None:
        by_token = mask if mask.dim() == 3 else mask[:, None]  # [B, 1 or L, H]
        context = context * by_token.transpose(1, 2)[..., None]
    return F.linear(context.transpose(1, 2).flatten(2), w.out_weight, w.out_bias)


def random_gate(share: float) -> hw.BudgetGate:
    """A gate that runs this share of the heads; :func:`randomise` makes its choice random."""
    # A target below 1 keeps the gate working even if every head runs.
    return hw.BudgetGate(budget=share, execution="selected")


@torch.no_grad()
def randomise(gate: Any, generator: torch.Generator) -> None:
    """Gives a ``BudgetGate`` random relevance, so that every sequence chooses its own heads."""
    weight = gate.relevance.weight  # [H, D]
    weight.copy_(torch.randn(weight.shape, generator=generator))
    gate.anneal(1.0)


class Layer:
    """A layer of random weights and an input; its forms share both.

    Args:
        training: compute gradients, of the input too, as in the middle of a network.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        training: bool = False,
    ):
        self.shape, self.dtype, self.device, self.training = shape, dtype, device, training
        self.generator = torch.Generator().manual_seed(seed)
        width = shape.width
        self.x = self.random(shape.batch, shape.length, width, scale=1.0)  # [B, L, D]
        self.weights = Weights(
            self.random(3 * width, width, scale=width**-0.5),
            self.random(3 * width, scale=0.1),
            self.random(width, width, scale=width**-0.5),
            self.random(width, scale=0.1),
            shape.heads,
        )
        for leaf in (self.x, *self.weights.tensors()):
            leaf.requires_grad_(training)

    def random(self, *size: int, scale: float) -> Tensor:
        values = torch.randn(*size, generator=self.generator) * scale
        return values.to(self.device, self.dtype)

    def module(self, heads: int) -> hw.MultiheadAttention:
        """headwise's layer; every sequence chooses its own ``heads`` heads."""
        shape = self.shape
        module = hw.MultiheadAttention(
            shape.width,
            shape.heads,
            batch_first=True,
            gate=random_gate(heads / shape.heads),
            device=self.device,
            dtype=self.dtype,
        )
        self.load(module)
        randomise(module.gate, self.generator)
        return module.train(self.training)

    def torch_module(self) -> nn.MultiheadAttention:
        """PyTorch's layer of all heads; in evaluation it takes its fast path."""
        shape = self.shape
        module = nn.MultiheadAttention(
            shape.width, shape.heads, batch_first=True, device=self.device, dtype=self.dtype
        )
        self.load(module)
        return module.train(self.training)

    @torch.no_grad()
    def load(self, module: nn.MultiheadAttention) -> None:
        """Gives ``module`` the layer's weights."""
        own = (
            module.in_proj_weight,
            module.in_proj_bias,
            module.out_proj.weight,
            module.out_proj.bias,
        )
        for parameter, value in zip(own, self.weights.tensors(), strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def touch(self, _: str | None = None) -> None:
        """Reads the input: in a network the layer before has just written it."""
        self.x.sum()

    def leaves(self, *modules: nn.Module) -> list[Tensor]:
        """The tensors that get gradients."""
        return [
            self.x,
            *self.weights.tensors(),
            *(parameter for module in modules for parameter in module.parameters()),
        ]

    def k_heads(self, heads: int) -> Weights:
        """The weights of the layer that physically has ``heads`` heads."""
        kept = self.weights.first(heads)
        for leaf in kept.tensors():
            leaf.requires_grad_(self.training)
        return kept

    def drawn_counts(self) -> Tensor:
        """A head count for each sequence, uniform in 1..H: int32 [B]."""
        counts = torch.randint(
            1, self.shape.heads + 1, (self.shape.batch,), generator=self.generator
        )
        return counts.int().to(self.device)

    def drawn_heads(self, count: Tensor) -> hw.Selection:
        """Random heads of the given counts."""
        relevance = torch.rand(self.shape.batch, self.shape.heads, generator=self.generator)
        index = hw.gates.select_heads(relevance.to(self.device), count)
        weight = torch.ops.headwise.selection_mask(index, count, self.dtype)  # [B, H]
        return hw.Selection(index, count, weight)

    def check(self, output: Tensor, mask: Tensor) -> float:
        """Compares ``output`` [B, L, D] with the oracle in float64; returns the error.

        Args:
            mask: [B, H] or [B, L, H], the weights of the heads that were chosen, 0 elsewhere.

        Raises:
            CheckFailed: it differs from the oracle's output.
        """
        with torch.no_grad():
            want = dense(self.x.double(), self.weights.to(torch.float64), mask.double())
        return compare(output, want, self.dtype)


def compare(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The largest error over the largest value.

    Raises:
        CheckFailed: it is beyond what ``dtype`` allows, or not finite.
    """
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    if not (math.isfinite(error) and error <= TOLERANCE[dtype]):
        raise CheckFailed(
            f"headwise differs from the oracle by {error:.2e}, more than {TOLERANCE[dtype]:.0e}"
        )
    return error


def observed(module: hw.MultiheadAttention, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The result of ``run``, and the mask [B, H] of the weights that the gate chose in it."""
    seen: list[Tensor] = []

    def observe(name: str, layer, selection: hw.Selection, x, padding) -> None:
        chosen = torch.ops.headwise.selection_mask(
            selection.index, selection.count, selection.weight.dtype
        )
        seen.append((selection.weight * chosen).detach())

    with hw.nn.instrument(module, evaluate=False) as opened:
        opened.observe(observe)
        output = run().detach()
    return output, seen[-1]
