"""The prompt's selection, stored in the layer of transformers' cache that has the keys and values,
so that it follows them.

The first time a layer stores a selection in a cache, the cache's layer changes to a subclass of its
class, which reorders, selects, repeats and drops the selection with the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.convert.older_versions import counted, mask_sizes
from headwise.gates.selection import Selection


class Kept(NamedTuple):
    """What a layer stores; see :class:`headwise.nn.key_value_cache.LayerCache`."""

    selection: Selection
    slots: Tensor | None

    def moved(self, function: Callable[[Tensor], Tensor]) -> Kept:
        """With ``function`` of each tensor, whose first dimension is the batch."""

        slots = None if self.slots is None else function(self.slots)
        return Kept(self.selection.moved(function), slots)


#: How the selection follows its layer: method -> its effect on a tensor [B, ...].
_MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda tensor, rows: tensor.index_select(0, rows.to(tensor.device)),
    "batch_select_indices": lambda tensor, rows: tensor[rows],
    "batch_repeat_interleave": lambda tensor, times: tensor.repeat_interleave(times, dim=0),
}


@functools.cache
def _keeping(kind: Any) -> Any:
    """The subclass of ``kind``, for cache layers that store a selection."""

    def moving(method: str) -> Callable[[Any, Any], None]:
        def move(self: Any, argument: Any) -> None:
            getattr(kind, method)(self, argument)
            if self.headwise_kept is not None:
                own = functools.partial(_apply, _MOVES[method], argument)
                self.headwise_kept = self.headwise_kept.moved(own)

        return move

    def reset(self: Any) -> None:
        kind.reset(self)
        self.headwise_kept = None

    body: dict[str, Any] = {method: moving(method) for method in _MOVES if hasattr(kind, method)}
    body.update(
        reset=reset,
        __reduce_ex__=lambda self, protocol: (_remake, (kind,), dict(vars(self))),
        __module__=__name__,
        _headwise_keeps=True,
        _layer_type=None,  # else the class would replace kind among transformers' own
    )
    return type(kind)(kind.__name__, (kind,), body)


def _apply(function: Callable[[Tensor, Any], Tensor], argument: Any, tensor: Tensor) -> Tensor:
    return function(tensor, argument)


def _remake(kind: Any) -> Any:
    made = _keeping(kind)
    return made.__new__(made)


class LayerCacheOf:
    """One layer of a cache of transformers, with the interface for :class:`GroupedQueryAttention`,
    during one call.

    Args:
        cache: a cache of transformers.
        layer: the number of its layer.
        groups: the layer's key/value heads.
        batch: sequences of this call.
        length: tokens of this call.
        only_own: they see no earlier tokens.
        device: of this call.
        options: what the model's call passes to the cache.
    """

    def __init__(
        self,
        cache: Any,
        layer: int,
        *,
        groups: int,
        batch: int,
        length: int,
        only_own: bool,
        device: torch.device,
        options: dict[str, Any],
    ):
        self._cache = cache
        self._layer = layer
        self._groups = groups
        self._batch = batch
        self._length = length
        self._only_own = only_own
        self._device = device
        self._options = options
        self._new: Kept | None = None  # chosen in this call

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._cache.update(counted(self._held, k), v, self._layer, self._options)
        if self._new is not None:
            self._keep(self._new)
        if self._only_own and k.size(2) > self._length:  # a static cache returns empty rows too
            k, v = k[:, :, : self._length], v[:, :, : self._length]
        return k, v

    def num_keys(self, length: int) -> int:
        return length if self._only_own else mask_sizes(self._cache, length, self._layer)[0]

    def held(self) -> tuple[Tensor, Tensor] | None:
        return None

    @property
    def _held(self) -> Any:
        """The layer of the cache; None: it is created when first updated."""
        layers = self._cache.layers
        return layers[self._layer] if self._layer < len(layers) else None

    def _keep(self, kept: Kept) -> None:
        held = self._held
        held.headwise_kept = kept
        if not hasattr(held, "_headwise_keeps") and not torch.compiler.is_compiling():
            kind: Any = type(held)
            held.__class__ = _keeping(kind)

    def _kept(self) -> Kept | None:
        if self._new is not None:
            return self._new
        held = self._held
        kept = getattr(held, "headwise_kept", None)
        if kept is None:
            return None
        if not torch.compiler.is_compiling():
            self._keep(kept)  # a compiled call could not change its class
            if kept.selection.index.device != self._device:
                kept = kept.moved(lambda tensor: tensor.to(self._device))
        return kept

    @property
    def selection(self) -> Selection | None:
        kept = self._kept()
        seen = 0 if self._held is None else self._cache.get_seq_length(self._layer)
        if isinstance(seen, Tensor) and self._length == 1 and torch.compiler.is_compiling():
            # A step of a compiled model: the graph cannot wait for the number.
            return None if kept is None else kept.selection
        if seen == 0:  # an emptied cache is reused for another sequence
            return None
        if kept is None:
            raise ValueError(
                f"cache has {int(seen)} tokens in layer {self._layer} and no selection of heads "
                f"for them: with keep_selection=True begin with an empty cache of transformers"
            )
        if kept.selection.index.size(0) != self._batch:
            raise ValueError(
                f"cache has selections of {kept.selection.index.size(0)} sequences in layer "
                f"{self._layer}, and the call has {self._batch}"
            )
        return kept.selection

    @selection.setter
    def selection(self, selection: Selection | None) -> None:
        self._new = None if selection is None else Kept(selection, None)

    @property
    def slots(self) -> Tensor | None:
        kept = self._kept()
        return None if kept is None else kept.slots

    @slots.setter
    def slots(self, slots: Tensor | None) -> None:
        assert self._new is not None  # a layer sets the selection first
        self._new = self._new._replace(slots=self._as_wide_as_held(slots))

    def _as_wide_as_held(self, slots: Tensor | None) -> Tensor | None:
        """An emptied cache may still be allocated for the key/value heads of the previous
        sequence."""
        held = self._held
        room = getattr(held, "keys", None) if getattr(held, "is_initialized", False) else None
        if room is None or room.dim() != 4 or torch.compiler.is_compiling():
            return slots
        wanted = self._groups if slots is None else slots.size(1)
        if room.size(1) == self._groups:
            return None
        if slots is not None and room.size(1) > wanted:
            return F.pad(slots, (0, room.size(1) - wanted), value=-1)
        if room.size(1) < wanted:
            held.is_initialized, held.keys, held.values = False, None, None
        return slots


class CrossCacheOf(LayerCacheOf):
    """The part of an ``EncoderDecoderCache`` that belongs to cross-attention."""

    def __init__(self, cache: Any, layer: int, **options: Any):
        if not hasattr(cache, "cross_attention_cache"):
            raise TypeError(
                f"cache must be an EncoderDecoderCache in cross-attention, got "
                f"{type(cache).__name__}"
            )
        super().__init__(cache.cross_attention_cache, layer, **options)
        self._whole = cache

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().update(k, v)
        self._whole.is_updated[self._layer] = True
        return k, v

    def held(self) -> tuple[Tensor, Tensor] | None:
        if not self._whole.is_updated.get(self._layer):
            return None
        held = self._held
        return held.keys, held.values
