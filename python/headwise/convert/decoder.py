"""The common parts of conversions of transformers models (version 5) to
:class:`headwise.GroupedQueryAttention`: caches, masks, the replacement.

A converted model names "headwise_causal" as its attention implementation. If a mask is just the
causal one, or that of padding, its layers then get no L x S mask but the padding alone.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
)

from headwise.convert.arguments import check_arguments, handed_on, one_cache, wants_maps
from headwise.convert.kept_selection import CrossCacheOf, LayerCacheOf
from headwise.convert.masks import split
from headwise.convert.older_versions import (
    collects_maps,
    make_mask,
    mask_sizes,
    query_offset,
    register_mask,
)
from headwise.convert.projections import Projected, ProjectedReplacement
from headwise.convert.transformers_attention import (
    name_implementation,
    unconverted_attention,
    use_plain_implementation,
)
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.proof import Draw, Trial

#: The attention implementation in the configuration of converted models.
IMPLEMENTATION = "headwise_causal"


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """None, the padding [B, S] of a causal or bidirectional call, or bool [B, 1, L, S]; nonzero =
    may be seen."""
    if mask_function is bidirectional_mask_function and kv_offset == 0:
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    ends_together = (q_length == 1 or kv_length == q_length) and not isinstance(q_offset, Tensor)
    if mask_function is causal_mask_function and ends_together and kv_offset == 0:
        if q_offset + q_length == kv_length and attention_mask is not None:
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            return padding[:, :kv_length]  # type: ignore[index]
    return make_mask(
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
register_mask(IMPLEMENTATION, _mask)


class Told:
    """Passed from a block's self-attention to its cross-attention: the padding of the queries,
    which the model passes only to the former. It belongs to the thread that runs the block."""

    def __init__(self) -> None:
        self._traced: Tensor | None = None  # while a graph is recorded, which knows no threads
        self._own = threading.local()

    def give(self, padding: Tensor | None) -> None:  # [B, L]
        if torch.compiler.is_compiling():
            self._traced = padding
        else:
            self._own.padding = padding

    def take(self, x: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling():
            padding, self._traced = self._traced, None
        else:
            padding = getattr(self._own, "padding", None)
            self._own.padding = None
        return padding if padding is not None and padding.shape == x.shape[:2] else None

    def __reduce__(self) -> tuple[type[Told], tuple[()]]:
        return type(self), ()


class SelectedDecoderAttention(ProjectedReplacement):
    """Replaces attention of transformers.

    Attributes:
        told: shared by a block's self- and cross-attention; None: there is no cross-attention.
    """

    #: Whether the original rotates queries and keys, and so needs the angles.
    rotates = True
    told: Told | None = None

    def trial_cache(self) -> Callable[[Tensor], LayerCacheOf]:
        cache = DynamicCache()
        return lambda x: self._layer_cache(cache, x, False, {})

    def _layer_cache(
        self, past: Any, x: Tensor, only_own: bool, options: dict[str, Any], cross: bool = False
    ) -> LayerCacheOf:
        number = getattr(self, "layer_idx", None)  # an encoder's layers may have none
        return (CrossCacheOf if cross else LayerCacheOf)(
            past,
            0 if number is None else number,
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
        """hidden_states [B, L, D] -> output [B, L, D] and, if asked for, attention weights [B, H,
        L, S].

        ``attention_mask`` is None (causal), [B, S] (nonzero = token; causal), or [B, 1 or H, L or
        1, S]: boolean (True = may attend) or floating (added to the scores). ``past_key_values`` is
        the name of ``cache`` in older versions of transformers.
        """
        past = one_cache(self, cache, past_key_values)
        if self.rotates and position_embeddings is None:
            raise TypeError(f"{type(self).__name__} needs position_embeddings, got None")
        rope = position_embeddings if self.rotates else None
        return self.attend(hidden_states, attention_mask, past, options, rope)

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: Any,
        options: dict[str, Any],
        rope: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
        bias: Callable[[int, int | Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the masks and caches of transformers.

        Args:
            x: ``[B, L, D]``.
            mask: as :func:`headwise.convert.masks.split` takes it.
            past: a cache of transformers, or None.
            options: the original's other arguments.
            rope: the rotary embedding's cosines and sines.
            memory: ``[B, S, D]``, the other sequence of cross-attention.
            bias: of the number of keys and the position of the first query: what is added to the
                scores, ``[1 or B, H, L, S]``.

        Returns:
            The output ``[B, L, D]`` and, if asked for, attention weights ``[B, H, L, S]``.
        """
        check_arguments(self, options)
        cross, length = memory is not None, x.size(1)
        causal = options.get("is_causal")
        if cross or causal is None or (mask is not None and mask.dim() == 4):
            causal = self.is_causal and not cross  # a mask of four dimensions is complete
        first, layer_cache, keys = None, None, length
        position: int | Tensor = 0
        if past is not None:
            # Without a mask, several tokens are the first ones.
            only_own = not cross and mask is None and length > 1
            past = past if cross else getattr(past, "self_attention_cache", past)
            whole = mask is not None and mask.dim() == 4
            if not cross and (whole or bias is not None):
                position = query_offset(past, self.layer_idx, options)
                if isinstance(position, Tensor):
                    position = position.clone()  # the cache counts in place
                held, offset = mask_sizes(past, length, self.layer_idx)
                keys, first = length if only_own else held, position - offset
                if mask is not None and mask.size(-1) not in (1, keys):
                    raise ValueError(
                        f"attention mask must have {keys} columns, one per key, got {mask.size(-1)}"
                    )
            layer_cache = self._layer_cache(
                past, x, only_own, {} if cross else handed_on(options), cross
            )
        call = split(mask, x, causal, first, cross)
        if self.told is not None:
            if cross:
                call = call._replace(query_padding_mask=self.told.take(x))
            else:
                self.told.give(call.query_padding_mask)
        if bias is not None:
            call = call.with_bias(bias(keys if memory is None else memory.size(1), position))
        if options.get("output_attentions") is None:  # not all models pass this
            options["output_attentions"] = collects_maps(self)
        return GroupedQueryAttention.forward(
            self,
            x,
            rope,
            key_padding_mask=call.key_padding_mask,
            query_padding_mask=call.query_padding_mask,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            cache=layer_cache,
            memory=memory,
            need_weights=wants_maps(self.config, options),
        )


class TransformersProjected(Projected):
    """Attention of transformers that becomes a :class:`SelectedDecoderAttention`.

    Attributes:
        replacement_class: class of the original -> class of its replacement
            (:func:`headwise.convert.replacements.replacement_classes`).
    """

    replacement_class: Callable[[type], type]

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> SelectedDecoderAttention:
        return type(self).replacement_class(type(module))(module, sizes, device="meta")

    def trial(self, module: nn.Module) -> Trial:
        width = module.get_submodule(self.places.output).out_features
        rope = self.sizes(module)["head_dim"] if self.rotates(module) else None
        if not module.is_causal and getattr(module, "is_decoder", False):
            return functools.partial(cross_outputs, width=width, cache_word=cache_word(module))
        if not self.caches(module):
            return functools.partial(encoder_outputs, width=width, rope=rope)
        word = cache_word(module)
        return functools.partial(decoder_outputs, width=width, rope=rope, cache_word=word)

    def caches(self, module: nn.Module) -> bool:
        """Whether ``module`` is causal attention that gets a cache."""
        return module.is_causal

    def rotates(self, module: nn.Module) -> bool:
        """Whether ``module`` gets the angles of a rotary embedding."""
        return False

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        configs = [module.config for module in converted if hasattr(module, "config")]
        name_implementation(model, configs, IMPLEMENTATION)
        link(model)


def link(model: nn.Module) -> None:
    """Lets the self-attention of each decoder block pass its padding to the cross-attention."""
    before: SelectedDecoderAttention | None = None
    for module in model.modules():
        if not isinstance(module, SelectedDecoderAttention):
            continue
        if getattr(module, "is_decoder", False) and not module.is_causal:
            if before is not None and before.is_causal and before.told is None:
                before.told = module.told = Told()
        before = module


def cache_word(original: nn.Module) -> str:
    """The name of the original's cache argument; transformers has renamed it."""
    known = inspect.signature(original.forward).parameters
    return next((word for word in ("cache", "layer_past") if word in known), "past_key_values")


def decoder_outputs(
    own: nn.Module, draw: Draw, width: int, rope: int | None, cache_word: str
) -> list[Tensor]:
    """A trial of causal attention and its replacement: with padding, without a mask, and with a
    cache, three tokens and then one."""
    use_plain_implementation(own)
    tokens, length = draw(2, 5, width), 5
    angles = None if rope is None else draw.rope(length, rope)
    word = mask_word(own)

    def call(start: int, stop: int, mask: Tensor | None, cache: Any = None) -> Tensor:
        options: dict[str, Any] = {word: mask} if cache is None else {word: mask, cache_word: cache}
        if angles is not None:
            options["position_embeddings"] = tuple(table[:, start:stop] for table in angles)
        return own(tokens[:, start:stop].contiguous(), **options)[0]

    unseen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    padded = draw.added(unseen | draw.padding(2, length)[:, None, None, :])
    first = draw.added(unseen[None, None, :3, :3].expand(2, -1, -1, -1))
    cache = DynamicCache()
    made = [call(0, length, padded), call(0, 3, first, cache), call(3, 4, None, cache)]
    if own.config._attn_implementation != "eager":  # which always gets a mask
        made.append(call(0, length, None))
    return made


def encoder_outputs(own: nn.Module, draw: Draw, width: int, rope: int | None) -> list[Tensor]:
    """A trial of attention that sees all of its sequence: with padding and without a mask."""
    use_plain_implementation(own)
    tokens = draw(2, 5, width)
    mask = draw.added(draw.padding(2, 5)[:, None, None, :].expand(-1, -1, 5, -1))
    options: dict[str, Any] = {} if rope is None else {"position_embeddings": draw.rope(5, rope)}
    return [own(tokens, **{mask_word(own): seen}, **options)[0] for seen in (mask, None)]


def cross_outputs(own: nn.Module, draw: Draw, width: int, cache_word: str) -> list[Tensor]:
    """A trial of cross-attention: with padding, and with a cache that an earlier call filled."""
    use_plain_implementation(own)
    tokens, memory = draw(2, 5, width), draw(2, 4, width)
    mask = draw.added(draw.padding(2, 4)[:, None, None, :].expand(-1, -1, 5, -1))
    cache, word = EncoderDecoderCache(DynamicCache(), DynamicCache()), mask_word(own)
    calls: list[dict[str, Any]] = [
        {word: mask},
        {cache_word: cache},
        {word: mask, cache_word: cache},
    ]
    return [own(tokens, key_value_states=memory, **options)[0] for options in calls]


def mask_word(own: nn.Module) -> str:
    """The name of the attention's mask argument."""
    return "mask" if "mask" in inspect.signature(own.forward).parameters else "attention_mask"
