"""Attention of every head that is zero, not NaN, for a query that sees no key, in other runtimes
too."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.headwise


def attend_every_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    added_keys: int = 0,
) -> Tensor:
    """``headwise::dense_attention``, in a form that ``torch.onnx.export`` translates correctly."""
    if is_masked(key_padding_mask, attn_mask) and torch.onnx.is_in_onnx_export():
        return attend_visible(q, k, v, key_padding_mask, attn_mask, is_causal, scale, added_keys)
    masks = (key_padding_mask, attn_mask, is_causal)
    return _ops.dense_attention(q, k, v, *masks, dropout_p, scale, added_keys=added_keys)


def is_masked(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> bool:
    """Whether there may be a query that sees no key."""
    return key_padding_mask is not None or attn_mask is not None


def attend_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    added_keys: int,
) -> Tensor:
    """``headwise::dense_attention`` without dropout, by the probabilities.

    PyTorch's kernels give zeros for a query that sees no key (padding before a causal sequence).
    The softmax of ONNX gives NaN, which the next layer spreads to every token.

    Shapes: ``q`` ``[B, H, L, d]``, ``k`` and ``v`` ``[B, H, S, d]`` -> ``[B, H, L, d]``.
    """
    masks = (key_padding_mask, attn_mask, is_causal)
    return _ops.attention_probabilities(q, k, *masks, scale, added_keys) @ v
