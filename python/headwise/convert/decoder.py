"""What conversions of transformers decoders (version 5) share: caches, masks, the successor.

A converted decoder names "headwise_causal" as its attention implementation. Where a mask is the
causal one and nothing else, its layers are then handed no L x S mask but the padding alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from headwise.convert.arguments import check_arguments, handed_on, one_cache, wants_maps
from headwise.convert.kept_selection import LayerCacheOf
from headwise.convert.older_versions import query_offset
from headwise.convert.transformers_attention import (
    for_each_sequence,
    unconverted_attention,
    use_plain_implementation,
)
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.proof import Draw

#: The attention implementation that converted decoders name in their configuration.
IMPLEMENTATION = "headwise_causal"


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
            return padding[:, :kv_length]  # type: ignore[index]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **options,
    )


AttentionInterface.register(IMPLEMENTATION, unconverted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _causal_mask)


class _Call(NamedTuple):
    """The masks of a call, as the layer takes them."""

    key_padding_mask: Tensor | None  # [B, S], True = padding
    query_padding_mask: Tensor | None  # [B, L]
    attn_mask: Tensor | None  # [B, 1 or H, L, S], True = may not attend, or floating
    is_causal: bool


def _split(mask: Tensor | None, x: Tensor, causal: bool, first: int | Tensor | None) -> _Call:
    """``first``: the column of ``mask`` that stands for the first query; None: the last L do."""
    length = x.size(1)
    if mask is None:
        return _Call(None, None, None, causal and length > 1)
    mask = for_each_sequence(mask, x)
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


class SelectedDecoderAttention(GroupedQueryAttention):
    """Stands in for a decoder's attention; its projections have the names of the original's."""

    #: Whether the original rotates queries and keys, and so must be given the angles.
    rotates = True

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(**sizes, **factory)
        for name, value in vars(original).items():  # config, layer_idx, is_causal, scaling, ...
            if not name.startswith("_") and name not in self.__dict__:
                setattr(self, name, value)

    def _resized(self, sizes: Mapping[str, Any], **factory: Any) -> SelectedDecoderAttention:
        return type(self)(self, sizes, **factory)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Gives the tensors of this module, which stands at ``name``, the names and layout that
        the original has in a state dict: those that they have."""

    def trial_cache(self) -> Callable[[Tensor], LayerCacheOf]:
        cache = DynamicCache()
        return lambda x: self._layer_cache(cache, x, False, {})

    def _layer_cache(
        self, past: Any, x: Tensor, only_own: bool, options: dict[str, Any]
    ) -> LayerCacheOf:
        return LayerCacheOf(
            past,
            self.layer_idx,
            groups=self.num_key_value_heads,
            batch=x.size(0),
            length=x.size(1),
            only_own=only_own,
            device=x.device,
            options=options,
        )

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, if asked for, maps [B, H, L, S].

        ``attention_mask`` is None (causal), [B, S] (nonzero = token; causal), or [B, 1 or H, L or
        1, S]: boolean (True = may attend) or floating (added to the scores). ``past_key_values`` is
        the name of ``cache`` in older versions of transformers.
        """
        check_arguments(self, options)
        past = one_cache(self, cache, past_key_values)
        if self.rotates and position_embeddings is None:
            raise TypeError(f"{type(self).__name__} needs position_embeddings, got None")
        length = hidden_states.size(1)
        causal = options.get("is_causal")
        if causal is None or attention_mask is not None:  # a mask says who sees whom
            causal = self.is_causal
        first, layer_cache = None, None
        if past is not None:
            past = getattr(past, "self_attention_cache", past)
            if attention_mask is not None and attention_mask.dim() == 4:
                _, offset = past.get_mask_sizes(length, self.layer_idx)
                first = query_offset(past, self.layer_idx) - offset
                if isinstance(first, Tensor):
                    first = first.clone()  # the cache counts on in place
            # Without a mask, more than one token are the first ones.
            only_own = attention_mask is None and length > 1
            layer_cache = self._layer_cache(past, hidden_states, only_own, handed_on(options))
        call = _split(attention_mask, hidden_states, causal, first)
        return super().forward(
            hidden_states,
            position_embeddings,
            key_padding_mask=call.key_padding_mask,
            query_padding_mask=call.query_padding_mask,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            cache=layer_cache,
            need_weights=wants_maps(self.config, options),
        )


def cache_word(original: nn.Module) -> str:
    """What the original calls the argument that is its cache; transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(original.forward).parameters else _OLD_WORD


_OLD_WORD = "past_key_values"


def decoder_outputs(
    own: nn.Module, draw: Draw, width: int, rope: int | None, cache_word: str
) -> list[Tensor]:
    """A trial of a decoder's attention and what stands in for it: with padding, without a mask, and
    with a cache, three tokens and then one."""
    use_plain_implementation(own)
    tokens, length = draw(2, 5, width), 5
    angles = None if rope is None else draw.rope(length, rope)

    def call(start: int, stop: int, mask: Tensor | None, cache: Any = None) -> Tensor:
        options = {} if cache is None else {cache_word: cache}
        if angles is not None:
            options["position_embeddings"] = tuple(table[:, start:stop] for table in angles)
        return own(tokens[:, start:stop].contiguous(), attention_mask=mask, **options)[0]

    unseen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    padded = draw.added(unseen | draw.padding(2, length)[:, None, None, :])
    first = draw.added(unseen[None, None, :3, :3].expand(2, -1, -1, -1))
    cache = DynamicCache()
    made = [call(0, length, padded), call(0, 3, first, cache), call(3, 4, None, cache)]
    if own.config._attn_implementation != "eager":  # which is always given a mask
        made.append(call(0, length, None))
    return made
