"""What older versions of transformers do differently.

The other files of this folder read as for the newest version. What another one does differently is
found out here, by what it has and not by its number; ``older_vit.py`` is the other layout of vision
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
    """Whether a model that does not hand this down was asked for attention maps in the call that is
    under way."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return getattr(config, "output_attentions", False)
    return any(name.endswith("attentions") for name in collector.get() or ())
