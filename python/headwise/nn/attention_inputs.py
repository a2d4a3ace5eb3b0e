"""Checks an attention layer's arguments and brings them into one form."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from headwise.io.checked import check_number, check_tensor, check_whole_number

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


class CalledLayer(Protocol):
    """The sizes of the called layer, as in ``torch.nn.MultiheadAttention``."""

    batch_first: bool
    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int


class AttentionInputs(NamedTuple):
    """A forward's arguments in one form: batched, batch first, masks checked."""

    query: Tensor  # [B, L, D]
    key: Tensor  # [B, S, Dk]
    value: Tensor  # [B, S, Dv]
    key_padding_mask: Tensor | None  # [B, S]
    attn_mask: Tensor | None  # [L, S] or [B, H, L, S]
    is_causal: bool
    query_is_key: bool
    self_attention: bool

    def part(self, rows: Tensor | None, heads: list[int]) -> AttentionInputs:
        """Those of some sequences (None: all), for a layer with only ``heads``."""

        def take(tensor: MaybeTensor) -> MaybeTensor:
            return tensor if tensor is None or rows is None else tensor.index_select(0, rows)

        query = take(self.query)
        key = query if self.query_is_key else take(self.key)
        value = key if self.value is self.key else take(self.value)
        mask = self.attn_mask
        if mask is not None and mask.dim() == 4:
            mask = take(mask)[:, heads]
        padding = take(self.key_padding_mask)
        return self._replace(
            query=query, key=key, value=value, key_padding_mask=padding, attn_mask=mask
        )


def _unsqueeze(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether both are the same numbers in the same memory, as one Python object or two."""
    if first is second:
        return True
    if torch.compiler.is_compiling() or first.is_nested or second.is_nested:
        return False  # neither has an address
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.stride() == second.stride()
        and first.storage_offset() == second.storage_offset()
        and torch._C._is_alias_of(first, second)  # type: ignore[attr-defined]
    )


def _check_features(name: str, tensor: Tensor, width: int) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if tensor.size(2) != width:
        raise ValueError(f"{name} must have {width} features, got {tensor.size(2)}")


def check_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        check_tensor(name, mask)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")


def canonical_inputs(
    layer: CalledLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> AttentionInputs:
    """Checks a forward's arguments and brings them into one form."""
    check_masks(key_padding_mask, attn_mask)
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query, key and value must all have 3 dimensions, or 2 for an unbatched input, got "
            f"{query.dim()}, {key.dim()} and {value.dim()}"
        )
    query_is_key = same_tensor(query, key)
    self_attention = query_is_key and same_tensor(key, value)
    if self_attention and torch.is_grad_enabled():
        # Views of one tensor, which hooks may pass on, have separate gradients.
        apart = any(tensor.requires_grad for tensor in (query, key, value))
        self_attention = query is key is value or not apart
    if query.dim() == 2:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        key_padding_mask = _unsqueeze(key_padding_mask)
    elif not layer.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    _check_features("query", query, layer.embed_dim)
    if not self_attention or layer.kdim != layer.embed_dim or layer.vdim != layer.embed_dim:
        _check_features("key", key, layer.kdim)
        _check_features("value", value, layer.vdim)
        if key.shape[:2] != value.shape[:2] or key.size(0) != query.size(0):
            raise ValueError(
                "query, key and value must agree in batch, and key and value in length, got "
                f"{tuple(query.shape[:2])}, {tuple(key.shape[:2])} and {tuple(value.shape[:2])}"
            )
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which must be given with it")
    batch, length, keys = query.size(0), query.size(1), key.size(1)
    if key_padding_mask is not None and key_padding_mask.shape != (batch, keys):
        raise ValueError(
            f"key_padding_mask must have shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}"
        )
    if attn_mask is not None and attn_mask.dim() == 2:
        if attn_mask.shape != (length, keys):
            raise ValueError(
                f"attn_mask must have shape {(length, keys)}, got {tuple(attn_mask.shape)}"
            )
    elif attn_mask is not None:
        expected = (batch * layer.num_heads, length, keys)
        if attn_mask.shape != expected:
            raise ValueError(
                f"attn_mask of 3 dimensions must have shape {expected}, "
                f"got {tuple(attn_mask.shape)}"
            )
        attn_mask = attn_mask.view(batch, layer.num_heads, length, keys)
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        key_padding_mask=key_padding_mask,
        attn_mask=None if is_causal else attn_mask,
        is_causal=is_causal,
        query_is_key=query_is_key,
        self_attention=self_attention,
    )


def check_sizes(embed_dim: int, num_heads: int, head_dim: int | None, dropout: float) -> None:
    for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check_whole_number(name, value)
    if head_dim is not None:
        check_whole_number("head_dim", head_dim)
    check_number("dropout", dropout)
    if embed_dim <= 0:
        raise ValueError(f"embed_dim must be positive, got {embed_dim}")
    if num_heads < 0 or (num_heads == 0 and head_dim is None):
        raise ValueError(f"num_heads must be positive (or 0 if head_dim is given), got {num_heads}")
    if head_dim is not None and head_dim <= 0:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    if head_dim is None and embed_dim % num_heads != 0:
        raise ValueError(
            f"num_heads must divide embed_dim={embed_dim} (or head_dim be given), got {num_heads}"
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
