"""Converts masks from the models' form to the layers'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.nn.decoder_inputs import with_bias


class Call(NamedTuple):
    """The masks of a call, as the layer takes them."""

    key_padding_mask: Tensor | None  # [B, S], True = padding
    query_padding_mask: Tensor | None  # [B, L]
    attn_mask: Tensor | None  # [B, 1 or H, L, S], True = may not attend, or floating
    is_causal: bool

    def with_bias(self, bias: Tensor) -> Call:
        """With ``bias [B or 1, H, L, S]`` added to the scores."""
        return self._replace(attn_mask=with_bias(self.attn_mask, bias))


def split(
    mask: Tensor | None,
    x: Tensor,
    causal: bool,
    first: int | Tensor | None = None,
    cross: bool = False,
) -> Call:
    """The masks of a call on ``x [B, L, D]``.

    Args:
        mask: ``[B or 1, S]``, nonzero = token; or ``[B or 1, H or 1, L or 1, S]``, boolean (True =
            may attend) or floating (added to the scores), which is complete.
        x: the queries' sequence.
        causal: whether no query sees later keys, if ``mask`` does not have four dimensions.
        first: the column of ``mask`` of the first query; None: the queries are the last L columns.
        cross: the keys are those of another sequence: nothing in the mask is about the queries.

    Raises:
        TypeError: a mask of four dimensions that is neither boolean nor floating.
        ValueError: a mask of other dimensions.
    """
    length = x.size(1)
    if mask is None:
        return Call(None, None, None, causal and length > 1)
    mask = for_each_sequence(mask, x)
    if mask.dim() == 2:  # [B, S], nonzero = token
        padding = mask == 0
        return Call(padding, None if cross else padding[:, -length:], None, causal)
    mask, unseen = complete(mask)
    if cross:
        same = mask.size(1) == 1 and mask.size(2) == 1
        return Call(mask[:, 0, 0, :], None, None, False) if same else Call(None, None, mask, False)
    # A token that does not see itself is padding.
    unseen = unseen.all(dim=1).expand(-1, length, -1)  # [B, L, S]
    if not isinstance(first, Tensor):
        padding = unseen.diagonal(mask.size(3) - length if first is None else first, 1, 2)  # [B, L]
    else:
        own = (torch.arange(length, device=mask.device) + first)[None, :, None]  # [1, L, 1]
        padding = unseen.gather(2, own.expand(unseen.size(0), -1, -1)).squeeze(2)
    if mask.size(1) == 1 and mask.size(2) == 1:  # the same for every head and query
        return Call(mask[:, 0, 0, :], padding, None, False)
    return Call(None, padding, mask, False)


def complete(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of four dimensions in torch's form (True = may not attend, or added to the scores),
    and where nothing may be attended to.

    Raises:
        TypeError: it is neither boolean nor floating.
        ValueError: it has other dimensions.
    """
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask must have 2 or 4 dimensions, got {mask.dim()} "
            f"(shape {tuple(mask.shape)})"
        )
    if mask.dtype == torch.bool:
        unseen = ~mask
        return unseen, unseen
    if not mask.is_floating_point():  # ones and zeros could be added or could mean tokens
        raise TypeError(
            f"attention_mask of 4 dimensions must be boolean or floating, got {mask.dtype}"
        )
    # transformers encodes 'may not attend' as the lowest finite number.
    unseen = mask < torch.finfo(mask.dtype).min / 2
    return mask.masked_fill(unseen, float("-inf")), unseen


def for_each_sequence(mask: Tensor, x: Tensor) -> Tensor:
    """A mask whose first dimension is the batch of x; transformers takes one mask for all."""
    shared = mask.size(0) == 1 and x.size(0) != 1
    return mask.expand(x.size(0), *mask.shape[1:]) if shared else mask
