"""Keys and values of the tokens so far, for decoding step by step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from headwise.gates.selection import Selection


class LayerCache(Protocol):
    """The interface of a cache for :class:`headwise.GroupedQueryAttention`.

    Attributes:
        selection: the prompt's selection (``keep_selection``); None if there is none yet.
        slots: int64 ``[B, K]``: the key/value heads stored for each sequence, if not all; the layer
            writes and reads this, and passes K instead of Hkv heads.
    """

    selection: Selection | None
    slots: Tensor | None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new keys and values ``[B, Hkv, L, d]``; returns all of them, ``[B, Hkv, S,
        d]``, the new ones last (or at the places in the mask of the same call)."""
        ...

    def num_keys(self, length: int) -> int:
        """How many keys :meth:`update` will return, given those of ``length`` tokens."""
        ...

    def held(self) -> tuple[Tensor, Tensor] | None:
        """For cross-attention: the keys and values, which an earlier call projected; None: this is
        the first."""
        ...


class KeyValueCache:
    """One layer's keys and values, appended with every call.

    ::

        caches = [hw.KeyValueCache() for _ in layers]
        y, _ = layer(prompt, rope, cache=caches[0])     # [B, L, D]
        y, _ = layer(token, rope, cache=caches[0])      # [B, 1, D]

    Attributes:
        k: ``[B, Hkv, S, d]``, rotated; None before the first call.
        v: ``[B, Hkv, S, d]``.
        selection: see :class:`LayerCache`.
        slots: see :class:`LayerCache`.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.selection: Selection | None = None
        self.slots: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.size(2)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # Both before either is stored: one may not fit.
        k = k if self.k is None else torch.cat([self.k, k], dim=2)
        v = v if self.v is None else torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v

    def num_keys(self, length: int) -> int:
        return len(self) + length

    def state(self) -> tuple[Any, ...]:
        """What :meth:`restore` takes: the tensors themselves, which no call changes in place."""
        return self.k, self.v, self.selection, self.slots

    def restore(self, state: tuple[Any, ...]) -> None:
        """Makes the cache what it was when :meth:`state` was called."""
        self.k, self.v, self.selection, self.slots = state

    def held(self) -> tuple[Tensor, Tensor] | None:
        return None if self.k is None or self.v is None else (self.k, self.v)

    def select_rows(self, rows: Tensor) -> None:
        """Selects the sequences ``rows``, int64 ``[B']``: some of them, in another order, or
        repeated. Their kept selection moves with them."""

        def select(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))

        selection = self.selection
        if selection is not None:
            selection = selection.moved(lambda part: part.index_select(0, rows.to(part.device)))
        self.restore((select(self.k), select(self.v), selection, select(self.slots)))

    def crop(self, length: int) -> None:
        """Drops all tokens after the first ``length``; with 0 the sequences too.

        Raises:
            ValueError: ``length`` is negative.
        """
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if length == 0:
            self.k = self.v = self.selection = self.slots = None
        elif self.k is not None and self.v is not None:
            self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]
