"""What older versions of transformers do differently.

The other files of this folder are written for the newest version. Differences of others are
detected here, by features and not by version number; ``older_vit.py`` is the other layout of vision
transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing


def query_offset(cache: Any, layer: int) -> int | Tensor:
    """The position of the first query of a call with this cache."""
    if hasattr(cache, "get_query_offset"):  # since 5.14
        return cache.get_query_offset(layer)
    return cache.get_seq_length(layer)


def collects_maps(config: Any) -> bool:
    """Whether a model that does not pass this on was asked for attention weights in the call that
    is under way."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return getattr(config, "output_attentions", False)
    return any(name.endswith("attentions") for name in collector.get() or ())
