"""What older versions of transformers do differently.

The other files of this folder are written for the newest version. Differences of others are
detected here, by features and not by version number; ``older_vit.py`` and ``older_t5.py`` are other
layouts of vision transformers and of T5.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, utils
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import sdpa_mask

#: Whether masks and caches are told the positions of the queries, ``cache_position [L]``, and not
#: their number and the first one's position (before 5.4).
_BY_POSITIONS = "cache_position" in inspect.signature(sdpa_mask).parameters


def query_offset(cache: Any, layer: int, options: Mapping[str, Any]) -> int | Tensor:
    """The position of the first query of a call with this cache and these arguments."""
    positions = options.get("cache_position") if _BY_POSITIONS else None
    if positions is not None:
        return positions[0]
    if hasattr(cache, "get_query_offset"):  # since 5.14
        return cache.get_query_offset(layer)
    return cache.get_seq_length(layer)


def mask_sizes(cache: Any, length: int, layer: int) -> tuple[int, int]:
    """The number of keys that a cache gives back when it is handed ``length`` more, and the
    position of the first."""
    return cache.get_mask_sizes(torch.empty(length) if _BY_POSITIONS else length, layer)


def make_mask(
    q_length: int, q_offset: int | Tensor, device: Any = None, **options: Any
) -> Tensor | None:
    """transformers' own mask for its implementation "sdpa"."""
    if not _BY_POSITIONS:
        device = {} if device is None else {"device": device}
        offset: Any = q_offset  # static caches count in a tensor
        return sdpa_mask(q_length=q_length, q_offset=offset, **device, **options)
    positions = torch.arange(q_length, device=device) + q_offset
    return sdpa_mask(cache_position=positions, **options)


def register_mask(name: str, function: Callable[..., Tensor | None]) -> None:
    """Lets models whose attention implementation has this name make their masks by ``function``,
    which is called as the newest version calls it."""

    def by_positions(cache_position: Tensor, kv_length: int, **options: Any) -> Tensor | None:
        length = cache_position.size(0)
        first: int | Tensor = cache_position[0]
        if kv_length == length and options.get("kv_offset", 0) == 0:
            first = 0  # there is room for these alone
        elif not torch.compiler.is_compiling():
            first = int(first)
        options.setdefault("device", cache_position.device)
        return function(q_length=length, kv_length=kv_length, q_offset=first, **options)

    AttentionMaskInterface.register(name, by_positions if _BY_POSITIONS else function)


def counted(layer: Any, k: Tensor) -> Tensor:
    """Keys ``[B, Hkv, L, d]`` that the layer of a cache knows for tokens: before 5.4 static caches
    count those whose keys are not zero, in the first head of the first sequence. A head that does
    not run has zeros for keys."""
    if not _BY_POSITIONS or not isinstance(layer, StaticLayer):
        return k
    mark = torch.zeros_like(k)
    mark[0, 0, :, 0] = torch.finfo(k.dtype).tiny
    return torch.where(k[:1, :1].any(dim=-1, keepdim=True), k, k + mark)


def gpt2_scale(attention: Any) -> float:
    """What GPT-2 multiplies its scores by."""
    if hasattr(attention, "scaling"):  # since 5.4
        return attention.scaling
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1 if attention.scale_attn_by_inverse_layer_idx else 1)


@functools.cache
def outputs(attention: type) -> int:
    """How many outputs the forward of this class has, going by its annotation."""
    annotation = inspect.signature(attention.forward).return_annotation  # type: ignore[attr-defined]
    return max(2, len(get_args(annotation)))


def relative_bias(attention: Any, length: int, keys: int, first: int | Tensor) -> Tensor:
    """T5's bias ``[1, H, length, keys]`` of queries of which the first has this position."""
    device = attention.relative_attention_bias.weight.device
    if "cache_position" not in inspect.signature(attention.compute_bias).parameters:  # since 5.4
        return attention.compute_bias(length, keys, device, first)
    positions = torch.arange(length, device=device) + first
    return attention.compute_bias(length, keys, device, positions)


def configuration(kind: Any, saved: dict[str, Any]) -> Any:
    """A configuration of this class as it was saved. Before 5.6 GPT-NeoX's forgets which part of a
    head is rotated."""
    config = kind.from_dict(copy.deepcopy(saved))  # which it changes
    own, rope = getattr(config, "rope_parameters", None), saved.get("rope_parameters")
    part = "partial_rotary_factor"
    if isinstance(own, dict) and isinstance(rope, dict) and part in own and part in rope:
        own[part] = rope[part]
    return config


def collects_maps(module: nn.Module) -> bool:
    """Whether a model that does not hand this down to ``module``, its attention, was asked for
    attention maps in the call that is under way."""
    asked = getattr(module.config, "output_attentions", False)
    if torch.compiler.is_compiling():
        return asked
    if not hasattr(utils, "output_capturing"):  # before 5.2 the maps are taken from its forward
        code = getattr(vars(module).get("forward"), "__code__", None)
        return asked or getattr(code, "co_name", None) == "wrapped_forward"
    collector = getattr(utils.output_capturing, "_active_collector", None)
    if collector is None:
        return asked
    return any(name.endswith("attentions") for name in collector.get() or ())
