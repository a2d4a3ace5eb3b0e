"""What a study of an encoder-decoder says about its three kinds of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.apps.compare.measure import gate_macs
from headwise.apps.compare.selections import HeadUse
from headwise.apps.tasks.examples import PairExamples
from headwise.explain.role_counts import KINDS
from headwise.nn.layers import attention_layers


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Name of each attention layer of a converted model -> "encoder", "decoder" (masked
    self-attention) or "cross"."""

    def kind(layer: nn.Module) -> str:
        if not getattr(layer, "is_decoder", False):
            return "encoder"
        return "decoder" if layer.is_causal else "cross"

    return {name: kind(layer) for name, layer in attention_layers(model).items()}


def by_attention(model: nn.Module, use: HeadUse) -> dict:
    """For a run's record: the mean share of the heads of each kind that ran.

    Args:
        model: the dense one, converted.
    """
    kinds = list(kinds_of(model).values())
    parts = use.chosen.double().split(list(use.layers), 1)
    shares = {
        kind: torch.cat([part for part, own in zip(parts, kinds, strict=True) if own == kind], 1)
        for kind in KINDS
    }
    return {"heads_by_attention": {kind: share.mean().item() for kind, share in shares.items()}}


def _head_macs(kind: str, sources: Tensor, targets: Tensor, width: int, head: int) -> Tensor:
    """Multiply-accumulates of a head for each pair of lengths, float64 [N]: its four projections
    and its attention. Keys and values of cross-attention are projected once."""
    n, m = sources, targets
    if kind == "cross":
        return 2 * width * head * (m + n) + 2 * m * n * head
    own = n if kind == "encoder" else m
    return 4 * width * head * own + 2 * own * own * head


def mac_ratios(dense: nn.Module, model: nn.Module, use: HeadUse, examples: PairExamples) -> dict:
    """Multiply-accumulates of a model relative to the dense one, converted, for the right
    translations."""
    kinds = list(kinds_of(dense).values())
    config: Any = dense.config
    width = config.d_model
    head = width // config.encoder_attention_heads
    n, m = (
        torch.tensor([len(text) for text in texts], dtype=torch.float64)
        for texts in (examples.sources, examples.targets)
    )
    costs = [
        _head_macs(kind, n, m, width, head).repeat(heads, 1).T
        for kind, heads in zip(kinds, use.layers, strict=True)
    ]
    each = torch.cat(costs, 1)  # [N, heads]
    attention, own = each.sum().item(), (each * use.chosen).sum().item()
    rest = 2 * width * config.encoder_layers * config.encoder_ffn_dim * n.sum().item()
    rest += 2 * width * config.decoder_layers * config.decoder_ffn_dim * m.sum().item()
    rest += width * config.vocab_size * m.sum().item()
    gates = gate_macs(model) * len(n)
    return {
        "macs_ratio_to_dense": (own + rest + gates) / (attention + rest),
        "attention_macs_ratio_to_dense": (own + gates) / attention,
    }
