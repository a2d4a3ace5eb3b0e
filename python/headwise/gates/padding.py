"""What counts as padding in a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def is_padding(mask: Tensor) -> Tensor:
    """bool, True for padding, of a boolean mask or of one that is added to attention scores.

    An added mask marks padding by a number that leaves a key no probability: -inf, or the least of
    a dtype.
    """
    return mask if mask.dtype == torch.bool else mask.float().exp() == 0
