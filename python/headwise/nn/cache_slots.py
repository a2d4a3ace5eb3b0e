"""Caches that hold, for each sequence, only the key/value heads that its selection reads."""

from __future__ import annotations

import torch
from torch import Tensor


def slots_of(index: Tensor, count: Tensor) -> Tensor | None:
    """int64 ``[B, K]``: the groups that each sequence keeps, ascending, padded with -1 to the
    largest number K; None if some sequence keeps all.

    The host must know the width: this waits for the device.

    Args:
        index: int32 ``[B, G]`` of a selection of groups.
        count: int32 ``[B]``.
    """
    if index.numel() == 0:
        return None
    most = max(int(count.max()), 1)
    return None if most == index.size(1) else index[:, :most].long()


def _place(slots: Tensor, like: Tensor) -> Tensor:
    """The slots' groups as an index into dimension 1 of a tensor ``[B, ., ...]``."""
    place = slots.clamp(min=0).view(*slots.shape, *[1] * (like.dim() - 2))
    return place.expand(-1, -1, *like.shape[2:])


def take(groups: Tensor, slots: Tensor) -> Tensor:
    """``[B, G, ...]`` -> ``[B, K, ...]``; a slot of -1 gets values that must not be read."""
    return groups.gather(1, _place(slots, groups))


def spread(held: Tensor, slots: Tensor, num_groups: int) -> Tensor:
    """``[B, K, ...]`` -> ``[B, G, ...]``, zeros in the groups that have no slot."""
    used = (slots >= 0).view(*slots.shape, *[1] * (held.dim() - 2))
    empty = held.new_zeros(held.size(0), num_groups, *held.shape[2:])
    return torch.scatter_add(empty, 1, _place(slots, held), held.masked_fill(~used, 0.0))
