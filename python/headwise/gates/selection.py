"""Which heads of a layer run, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The heads that a gate chose.

    All shapes are fixed, so nothing that consumes a selection waits for the device or recompiles.

    Attributes:
        index: int32 ``[B, H]``. Row ``b`` starts with ``count[b]`` head numbers, ascending;
            the rest is -1.
        count: int32 ``[B]``, ``0 <= count <= H``. Zero heads are allowed: the layer's output is
            then its output bias.
        weight: floating ``[B, H]``, multiplies a head's output before the output projection; 0 for
            heads that were not chosen. Differentiable.
        relevance: floating ``[B, H]``, by which the heads were ranked, or None.
        budget: floating ``[B]``, the requested fraction of heads, or None.
    """

    index: Tensor  # type: ignore[assignment]  # tuples have methods of these names
    count: Tensor  # type: ignore[assignment]
    weight: Tensor
    relevance: Tensor | None = None
    budget: Tensor | None = None

    def moved(self, function: Callable[[Tensor], Tensor]) -> Selection:
        """With ``function`` of each tensor."""
        return Selection(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


class TokenSelection(NamedTuple):
    """The heads that a gate chose for every token.

    Attributes:
        chosen: bool ``[B, L, H]``; none for a token of padding.
        weight: floating ``[B, L, H]``, multiplies a head's output for the token before the output
            projection; 0 for heads that were not chosen. Differentiable.
        relevance: floating ``[B, L, H]``, by which the heads were ranked, or None.
    """

    chosen: Tensor
    weight: Tensor
    relevance: Tensor | None = None


def select_heads(relevance: Tensor, count: Tensor) -> Tensor:
    """The ``count[b]`` heads of largest ``relevance[b]``; ties go to the lower head.

    Args:
        relevance: floating ``[B, H]``.
        count: int32 or int64 ``[B]``, ``0 <= count <= H``.

    Returns:
        int32 ``[B, H]``: the ``index`` of a :class:`Selection`.

    Raises:
        ValueError: wrong shapes, a count out of range or (on a CPU) relevance that is not finite.
    """
    return torch.ops.headwise.select_heads(relevance, count)


def select_all(batch: int, num_heads: int, *, device=None, dtype=None) -> Selection:
    """Every head of every sequence, with weight one."""
    index = torch.arange(num_heads, dtype=torch.int32, device=device)
    return Selection(
        index=index.expand(batch, num_heads).contiguous(),
        count=torch.full((batch,), num_heads, dtype=torch.int32, device=device),
        weight=torch.ones(batch, num_heads, dtype=dtype, device=device),
    )
