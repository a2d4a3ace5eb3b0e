"""What conversions of transformers decoders (version 5) share: caches, masks, the successor.

A converted decoder names "headwise_causal" as its attention implementation. Where a mask is the
causal one and nothing else, its layers are then handed no L x S mask but the padding alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from headwise.convert.transformers_attention import unconverted_attention
from headwise.gates.selection import Selection
from headwise.nn.grouped_query_attention import GroupedQueryAttention

#: The attention implementation that converted decoders name in their configuration.
IMPLEMENTATION = "headwise_causal"

_SELECTIONS = (
    "_headwise_selections"  # attribute of a cache of transformers: what its layers keep there
)


def _causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """None, the padding bool [B, S] of a causal call, or bool [B, 1, L, S]; True = may be seen."""
    ends_together = (q_length == 1 or kv_length == q_length) and not isinstance(q_offset, Tensor)
    if mask_function is causal_mask_function and ends_together and kv_offset == 0:
        if q_offset + q_length == kv_length and attention_mask is not None:
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            return padding[:, :kv_length]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **options,
    )


AttentionInterface.register(IMPLEMENTATION, unconverted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _causal_mask)


class LayerCacheOf:
    """One layer of a cache of transformers, as :class:`GroupedQueryAttention` asks for it."""

    def __init__(self, cache: Any, layer: int, length: int, only_own: bool):
        self._cache = cache
        self._layer = layer
        self._length = length  # tokens of this call
        self._only_own = only_own  # they see nothing before them

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._cache.update(k, v, self._layer)
        if self._only_own and k.size(2) > self._length:  # a static cache gives its empty rows too
            k, v = k[:, :, : self._length], v[:, :, : self._length]
        return k, v

    @property
    def _kept(self) -> dict[Any, Any]:
        if not hasattr(self._cache, _SELECTIONS):
            setattr(self._cache, _SELECTIONS, {})
        return getattr(self._cache, _SELECTIONS)

    @property
    def selection(self) -> Selection | None:
        kept = self._kept.get(self._layer)
        if kept is None:
            return None
        seen = self._cache.get_seq_length(self._layer)
        if isinstance(seen, Tensor) and self._length == 1 and torch.compiler.is_compiling():
            return kept  # a step of a compiled model: the graph cannot wait for the number
        return None if seen == 0 else kept  # a cache that was emptied serves another sequence

    @selection.setter
    def selection(self, selection: Selection) -> None:
        self._kept[self._layer] = selection

    @property
    def slots(self) -> Tensor | None:
        return self._kept.get((self._layer, "slots"))

    @slots.setter
    def slots(self, slots: Tensor | None) -> None:
        self._kept[self._layer, "slots"] = slots


class _Call(NamedTuple):
    """The masks of a call, as the layer takes them."""

    key_padding_mask: Tensor | None  # [B, S], True = padding
    query_padding_mask: Tensor | None  # [B, L]
    attn_mask: Tensor | None  # [B, 1 or H, L, S], True = may not attend, or floating
    is_causal: bool


def _split(mask: Tensor | None, length: int, causal: bool, first: int | Tensor | None) -> _Call:
    """``first``: the column of ``mask`` that stands for the first query; None: the last L do."""
    if mask is None:
        return _Call(None, None, None, causal and length > 1)
    if mask.dim() == 2:  # [B, S], nonzero = token
        padding = mask == 0
        return _Call(padding, padding[:, -length:], None, causal)
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask must have 2 or 4 dimensions, got {mask.dim()} "
            f"(shape {tuple(mask.shape)})"
        )
    if mask.dtype == torch.bool:
        mask = unseen = ~mask  # True = may not attend
    else:
        # transformers writes 'may not attend' as the lowest finite number.
        unseen = mask < torch.finfo(mask.dtype).min / 2
        mask = mask.masked_fill(unseen, float("-inf"))
    # A token that does not see itself is padding.
    unseen = unseen.all(dim=1).expand(-1, length, -1)  # [B, L, S]
    if not isinstance(first, Tensor):
        padding = unseen.diagonal(mask.size(3) - length if first is None else first, 1, 2)  # [B, L]
    else:
        own = (torch.arange(length, device=mask.device) + first)[None, :, None]  # [1, L, 1]
        padding = unseen.gather(2, own.expand(unseen.size(0), -1, -1)).squeeze(2)
    if mask.size(1) == 1 and mask.size(2) == 1:  # the same for every head and query
        return _Call(mask[:, 0, 0, :], padding, None, False)
    return _Call(None, padding, mask, False)


class SelectedDecoderAttention(nn.Module):
    """Stands where a decoder's attention stood."""

    def __init__(self, original: nn.Module, gqa: GroupedQueryAttention):
        nn.Module.__init__(self)
        for name, value in vars(original).items():  # layer_idx, is_causal, scaling, config, ...
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.gqa = gqa

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, where asked for, maps [B, H, L, S].

        ``attention_mask`` is None (causal), [B, S] (nonzero = token; causal), or [B, 1 or H, L or
        1, S]: boolean (True = may attend) or floating (added to the scores).
        """
        length = hidden_states.size(1)
        causal = options.get("is_causal")
        causal = self.is_causal if causal is None else causal
        first, cache = None, None
        if past_key_values is not None:
            past = getattr(past_key_values, "self_attention_cache", past_key_values)
            if attention_mask is not None and attention_mask.dim() == 4:
                _, offset = past.get_mask_sizes(length, self.layer_idx)
                first = past.get_query_offset(self.layer_idx) - offset
                if isinstance(first, Tensor):
                    first = first.clone()  # the cache counts on in place
            # Without a mask, more than one token are the first ones.
            only_own = attention_mask is None and length > 1
            cache = LayerCacheOf(past, self.layer_idx, length, only_own)
        call = _split(attention_mask, length, causal, first)
        need_weights = options.get("output_attentions")
        if need_weights is None:
            need_weights = getattr(self.config, "output_attentions", False)
        return self.gqa(
            hidden_states,
            position_embeddings,
            key_padding_mask=call.key_padding_mask,
            query_padding_mask=call.query_padding_mask,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            cache=cache,
            need_weights=bool(need_weights),
        )
