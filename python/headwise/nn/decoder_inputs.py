"""Checks the arguments of a decoder's attention layer and brings them into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from headwise.io.checked import check_tensor, check_whole_number
from headwise.nn.attention_inputs import check_masks, check_sizes
from headwise.nn.attention_layer import AttentionLayer

_ops = torch.ops.headwise


class Masks(NamedTuple):
    """Which query may attend to which key, as the operators take it."""

    key_padding_mask: Tensor | None  # [B, S]
    attn_mask: Tensor | None  # broadcastable to [B, H, L, S]
    is_causal: bool  # query i sees keys 0..i: S is L

    @property
    def same_for_all_heads(self) -> bool:
        return self.attn_mask is None or self.attn_mask.dim() < 3 or self.attn_mask.size(-3) == 1


def align(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
) -> Masks:
    """The masks of queries ``[B, H, L, d]`` at the positions of the last of the keys ``[B, Hkv, S,
    d]``.

    The operators' causal flag aligns the first query with the first key; other alignments need a
    mask. ``align_masks`` of C++ has the same rule: an operator cannot, because ``torch.export``
    does not store a flag among an operator's results.
    """
    length, keys = q.size(2), k.size(2)
    if window is not None and window >= keys:
        window = None
    if not is_causal or (length == 1 and window is None):
        return Masks(key_padding_mask, attn_mask, False)
    if length == keys and window is None and attn_mask is None:
        return Masks(key_padding_mask, None, True)
    return Masks(key_padding_mask, _ops.causal_mask(q, k, attn_mask, window), False)


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A boolean (True = may not attend) or floating mask, with ``bias`` added to the scores."""
    if mask is None:
        return bias
    return bias.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def with_added_keys(
    masks: Masks, length: int, keys: int, added: int, device: torch.device
) -> Masks:
    """Masks of :func:`align` that also cover the last ``added`` of ``keys`` keys, which all queries
    see."""
    if added == 0:
        return masks
    padding, mask, is_causal = masks
    if is_causal:  # and then there is no mask
        mask = torch.ones(length, keys - added, dtype=torch.bool, device=device).triu(1)
    pad = torch.nn.functional.pad
    if padding is not None:
        padding = pad(padding, (0, added))
    if mask is not None:
        mask = pad(mask.expand(*mask.shape[:-1], keys - added), (0, added))
    return Masks(padding, mask, False)


def hide(padding: Tensor | None, seen: Tensor | int | None, x: Tensor) -> Tensor | None:
    """Tokens hidden from the gate, [B, L]: padding, and those that ``headwise.gates_see``
    excludes."""
    if seen is None:
        return padding
    number = isinstance(seen, int)
    return _ops.hide_tokens(x, padding, None if number else seen, seen if number else None)


def forward_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward other than that of its class. (transformers before 5.2
    leaves the module's own there, bound, when it has collected a model's outputs.)"""
    own = vars(module).get("forward")
    bound = getattr(own, "__self__", None) is module
    return own is not None and not (bound and own.__func__ is type(module).forward)


def is_own(linear: nn.Module) -> bool:
    """Whether calling the module only multiplies by its weight and adds its bias."""
    return (
        type(linear) is nn.Linear
        and not is_traceable_wrapper_subclass(linear.weight)  # quantized by torchao
        and not forward_replaced(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
    )


def linear(features: int, outputs: int, bias: bool, factory: dict[str, Any]) -> nn.Linear:
    if features > 0 and outputs > 0:
        return nn.Linear(features, outputs, bias=bias, **factory)
    # The initialisation of an empty matrix divides by its width and warns.
    made = nn.Linear(1, 1, bias=bias, **factory)
    made.in_features, made.out_features = features, outputs
    made.weight = nn.Parameter(torch.empty((outputs, features), **factory))
    if bias:
        made.bias = nn.Parameter(torch.zeros(outputs, **factory))
    return made


def set_parameter(module: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))


def epsilon_of(norm: nn.Module | None) -> float | None:
    if norm is None:
        return None
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` computes what ``torch.nn.RMSNorm`` of its epsilon and ``weight`` does (that
    of Gemma multiplies by 1 + weight)."""
    if {name for name, _ in norm.named_parameters()} != {"weight"}:
        return False
    generator = torch.Generator().manual_seed(0)
    shape = norm.weight.shape
    x, weight = (torch.randn(shape, generator=generator) for _ in range(2))
    own = torch.func.functional_call(norm, {"weight": weight}, x)
    plain = torch.nn.functional.rms_norm(x, shape, weight, epsilon_of(norm))
    return torch.allclose(own, plain, rtol=1e-4, atol=1e-5)


def even_groups(num_heads: int, groups: int) -> list[int]:
    return [head * groups // num_heads for head in range(num_heads)]


def check_group_sizes(
    embed_dim: int,
    num_heads: int,
    groups: int,
    head_dim: int | None,
    dropout: float,
    key_value_heads: Sequence[int] | None,
) -> None:
    check_sizes(embed_dim, num_heads, head_dim, dropout)
    check_whole_number("num_key_value_heads", groups)
    if groups < 0 or (groups == 0) != (num_heads == 0):
        raise ValueError(f"num_key_value_heads must be positive, got {groups}")
    if key_value_heads is None:
        if groups and num_heads % groups != 0:
            raise ValueError(f"num_key_value_heads must divide num_heads={num_heads}, got {groups}")
        return
    if len(key_value_heads) != num_heads or sorted(set(key_value_heads)) != list(range(groups)):
        raise ValueError(
            f"key_value_heads must name one of {groups} key/value heads for each of {num_heads} "
            f"query heads, and each of them, got {list(key_value_heads)}"
        )
    if list(key_value_heads) != sorted(key_value_heads):
        raise ValueError(f"key_value_heads must be ascending, got {list(key_value_heads)}")


def check_inputs(
    layer: AttentionLayer,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    check_tensor("x", x)
    if x.dim() != 3 or x.size(2) != layer.embed_dim:
        raise ValueError(f"x must have shape [B, L, {layer.embed_dim}], got {list(x.shape)}")
    check_masks(key_padding_mask, attn_mask)
    if key_padding_mask is not None and (
        key_padding_mask.dim() != 2 or key_padding_mask.size(0) != x.size(0)
    ):
        raise ValueError(
            f"key_padding_mask must have shape [{x.size(0)}, S], got {list(key_padding_mask.shape)}"
        )
    padding = query_padding_mask
    if padding is not None and padding.dtype != torch.bool:
        raise TypeError(f"query_padding_mask must be boolean, got {padding.dtype}")
    if padding is not None and padding.shape != x.shape[:2]:
        raise ValueError(
            f"query_padding_mask must have shape {list(x.shape[:2])}, got {list(padding.shape)}"
        )
    if position_embeddings is None:
        return
    cos, sin = position_embeddings
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 and table.size(0) in (1, x.size(0)) and table.size(1) == x.size(1)
        if not fits or table.size(2) > layer.head_dim or table.size(2) % 2 != 0:
            raise ValueError(
                f"{name} of position_embeddings must have shape [{x.size(0)} or 1, {x.size(1)}, r] "
                f"with r even and at most {layer.head_dim}, got {list(table.shape)}"
            )


def check_cache(cache: object) -> None:
    if cache is not None and not (hasattr(cache, "num_keys") and hasattr(cache, "held")):
        raise TypeError(
            f"cache must be a headwise.KeyValueCache or None, got {type(cache).__name__}"
        )


def check_keys(
    layer: AttentionLayer,
    x: Tensor,
    keys: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Checks masks of a call on ``x`` that sees ``keys`` keys, before a cache gets any of them."""
    if key_padding_mask is not None and key_padding_mask.size(1) != keys:
        raise ValueError(
            f"key_padding_mask must have {keys} columns, one per key, "
            f"got {key_padding_mask.size(1)}"
        )
    if attn_mask is None or torch.compiler.is_compiling():  # the operators check it, too
        return
    whole = (x.size(0), layer.num_heads, x.size(1), keys)
    sizes = attn_mask.shape
    if len(sizes) > 4 or any(
        size not in (1, most) for size, most in zip(sizes[::-1], whole[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask must be broadcastable to {list(whole)}, got {list(sizes)}")


def check_memory(
    layer: AttentionLayer,
    x: Tensor,
    memory: Tensor,
    is_causal: bool,
    position_embeddings: tuple[Tensor, Tensor] | None,
) -> None:
    fits = memory.dim() == 3 and memory.size(0) == x.size(0) and memory.size(2) == layer.embed_dim
    if not fits:
        raise ValueError(
            f"memory must have shape [{x.size(0)}, S, {layer.embed_dim}], got {list(memory.shape)}"
        )
    if is_causal or position_embeddings is not None:
        raise ValueError(
            "is_causal must be False and position_embeddings None with memory: the positions of "
            "another sequence are not those of the queries"
        )
