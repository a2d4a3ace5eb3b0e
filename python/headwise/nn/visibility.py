"""Limiting what gates see, so that causal training does not learn from the future."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.instrumenting import replaced
from headwise.nn.layers import attention_layers

__all__ = ["gates_see"]


class GatesSee:
    """What :func:`gates_see` returns: a ``with`` block in which gates see only some tokens."""

    def __init__(self, block: contextlib.AbstractContextManager) -> None:
        self._block = block
        self._entered = False

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError("gates_see must be called for each with block")
        self._entered = True
        self._block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)

    def __del__(self) -> None:
        # A call as a statement would otherwise silently let the gates see everything.
        if not self._entered and not sys.is_finalizing():
            warnings.warn(
                "gates_see has limited nothing: write `with headwise.gates_see(model, tokens):`",
                stacklevel=2,
            )


def gates_see(model: nn.Module, tokens: Tensor | int) -> GatesSee:
    """The gates of a decoder see only these tokens inside the ``with`` block.

    A gate that pools a whole sequence leaks information about later tokens to every position,
    through the choice of heads. In training a causal language model on whole sequences, that leaks
    what is to be predicted; in generation there are no later tokens. Two ways avoid it: let the
    gates see only the prompt, and compute the loss on the answer alone,

    ::

        labels[:, :prompt_length] = -100
        with hw.gates_see(model, labels == -100):       # [B, L]: True = may be seen
            loss = model(input_ids, labels=labels).loss + hw.penalty(model)

    or let them see the first n tokens, and exclude those from the loss: ``hw.gates_see(model, n)``.
    Both fit ``convert(..., keep_selection=True)``, which in generation chooses by the prompt alone.
    Padding is never seen. A sequence without visible tokens is treated like one that is all
    padding. The block is about every call of the model, also by another thread.

    Args:
        model: a converted model; layers other than :class:`headwise.GroupedQueryAttention`, and
            those of an encoder before the decoder, are left alone.
        tokens: boolean ``[B, L]``, True = seen, of the sequences that the model is called with; or
            a number: the first that are not padding.

    Returns:
        A context manager. If it is never entered, a warning is given when it is deleted.

    Raises:
        TypeError: ``tokens`` is neither.
        ValueError: a number that is not positive, a tensor of another shape, or a model without
            such layers. A forward on other shapes raises ValueError.
    """
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool:
            raise TypeError(f"tokens must be boolean or a number, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape [B, L], got {list(tokens.shape)}")
    elif isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens must be boolean or a number, got {type(tokens).__name__}")
    elif tokens <= 0:
        raise ValueError(f"tokens must be positive, got {tokens}")
    layers = [
        layer
        for layer in attention_layers(model).values()
        # Of an encoder-decoder, the decoder's: their input is what tokens are about.
        if isinstance(layer, GroupedQueryAttention) and getattr(layer, "is_decoder", True)
    ]
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.GroupedQueryAttention: "
            f"call headwise.convert first"
        )
    return GatesSee(replaced(layers, "_seen", tokens))
