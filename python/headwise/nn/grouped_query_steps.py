"""What a grouped-query layer computes, step by step: projections, rotation, attention, output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.gates.selection import Selection
from headwise.nn.attention_layer import AttentionProbe
from headwise.nn.decoder_inputs import Masks, is_own, is_rms_norm, with_added_keys
from headwise.nn.grouped_query_sizes import GroupedQuerySizes
from headwise.nn.key_value_cache import LayerCache
from headwise.nn.visible_keys import attend_every_head

_ops = torch.ops.headwise


class GroupedQuerySteps(GroupedQuerySizes):
    """The steps of :class:`headwise.GroupedQueryAttention`, which calls them in the order of this
    file. Layers of other models override some of them."""

    @property
    def variant(self) -> str | None:
        own = type(self)
        steps = ("_project", "_rotate", "_scored", "_filtered", "_weights")
        other = any(getattr(own, s) is not getattr(GroupedQuerySteps, s) for s in steps)
        norms = (norm for norm in (self.q_norm, self.k_norm) if norm is not None)
        return own.__name__ if other or not all(map(is_rms_norm, norms)) else None

    def _groups(self, chosen: Selection | None, cache: LayerCache | None) -> Selection | None:
        """The key/value heads that are read now or later; None: all."""
        if chosen is None or self.key_value_heads is not None:
            return None
        kept = self.keep_selection or getattr(self.gate, "projects", False)
        if cache is not None and not kept:
            return None  # a later step may choose others
        if self.num_heads == self.num_key_value_heads:
            return chosen
        index, count = _ops.select_groups(
            chosen.index, chosen.count, self.num_heads, self.num_key_value_heads
        )
        return chosen._replace(index=index, count=count)

    def _slots(self, selection: Selection) -> Tensor | None:
        """The key/value heads that a cache must hold for this selection, [B, K]; None: all."""
        if self.training or self.key_value_heads is not None or torch.compiler.is_compiling():
            return None
        groups = self._groups(selection, None)
        return None if groups is None else _ops.slots_of(groups.index, groups.count)

    def _project(
        self,
        linear: nn.Module,
        x: Tensor,
        num_heads: int,
        norm: nn.Module | None,
        chosen: Selection | None,
    ) -> Tensor:
        """[B, L, D] -> [B, heads, L, d]; zeros for heads that were not chosen."""
        if chosen is not None and is_own(linear):
            heads = _ops.selected_projection(
                x, linear.weight, linear.bias, num_heads, chosen.index, chosen.count
            )
        else:
            heads = linear(x).view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)
        return heads if norm is None else norm(heads)

    def _rotate(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        cos, sin = position_embeddings
        return _ops.rotate_heads(q, cos, sin), _ops.rotate_heads(k, cos, sin)

    def _scored(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Masks,
        chosen: Selection | None,
        slots: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Masks]:
        """What the operators get: here as it is. A subclass whose scores are more than scaled
        products changes masks, or adds features and :attr:`_added_keys` keys, which masks do not
        cover."""
        return q, k, v, masks

    def _filtered(self, context: Tensor, x: Tensor, chosen: Selection | None) -> Tensor:
        """What becomes of the heads' outputs [B, H, L, d] before the output projection."""
        return context

    def _cached(self, cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_key_value_heads > 0:
            return cache.update(k, v)
        # A layer without heads: models count the tokens in their caches, so they must be there.
        token = k.new_zeros(k.size(0), 1, k.size(2), 1)
        return self._no_heads(cache.update(token, token)[0])

    def _no_heads(self, held: Tensor) -> tuple[Tensor, Tensor]:
        empty = held.new_zeros(held.size(0), 0, held.size(2), self.head_dim)
        return empty, empty

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _for_each_head(self, shared: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, H, S, d]: one per query head."""
        if self._place is not None:
            return shared.index_select(1, self._place)
        if self.num_heads == self.num_key_value_heads:
            return shared
        return shared.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        """Every head: [B, H, L, d]."""
        batch, heads, length, width = q.shape
        shared = k.size(1)
        even, added = self.key_value_heads is None and heads != shared, self._added_keys
        if even and length == 1 and masks.same_for_all_heads:
            # One query: the heads of a group are the rows of one product with its keys.
            rows = q.reshape(batch, shared, heads // shared, width)
            context = attend_every_head(rows, k, v, *masks, self._dropout(), self.scale, added)
            return context.reshape(batch, heads, 1, v.size(3))
        if even and masks.key_padding_mask is None and masks.attn_mask is None and added == 0:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=self._dropout(),
                is_causal=masks.is_causal,
                scale=self.scale,
                enable_gqa=True,
            )
        k, v = self._for_each_head(k), self._for_each_head(v)
        return attend_every_head(q, k, v, *masks, self._dropout(), self.scale, added)

    def _attend_chosen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Selection,
        masks: Masks,
        slots: Tensor | None,
    ) -> Tensor:
        """[B, H, L, d], zeros for heads that were not chosen; with ``slots`` of k and v [B, K, S,
        d]."""
        index, count = chosen.index, chosen.count
        each = self.num_heads // max(self.num_key_value_heads, 1)
        if self.key_value_heads is not None:
            k, v = self._for_each_head(k), self._for_each_head(v)
        elif slots is not None:
            q = _ops.take_slots(q.unflatten(1, (-1, each)), slots)  # [B, K, H / Hkv, L, d]
            q = q.flatten(1, 2)
            if masks.attn_mask is not None and not masks.same_for_all_heads:
                own = masks.attn_mask.expand(q.size(0), self.num_heads, -1, -1)
                own = _ops.take_slots(own.unflatten(1, (-1, each)), slots).flatten(1, 2)
                masks = masks._replace(attn_mask=own)
            if self._runs_whole_slots(count, q.size(1)):
                context = self._attend(q, k, v, masks).unflatten(1, (-1, each))
                return _ops.spread_slots(context, slots, self.num_key_value_heads).flatten(1, 2)
            # The same attention, among the heads that read a slot.
            ran = _ops.selection_mask(index, count, q.dtype).unflatten(1, (-1, each))
            ran = _ops.take_slots(ran, slots) * (slots >= 0)[:, :, None]  # [B, K, H / Hkv]
            index, count = _ops.select_nonzero(ran.flatten(1))
        masks = with_added_keys(masks, q.size(2), k.size(2), self._added_keys, q.device)
        dropout, seed = self._dropout(), None
        if dropout > 0.0:
            seed = torch.randint(2**63 - 1, (1,), device=q.device)
        context = _ops.selected_attention(
            q, k, v, index, count, None, *masks, dropout, seed, self.scale
        )
        if slots is None:
            return context
        groups = context.unflatten(1, (-1, each))  # [B, K, H / Hkv, L, d]
        return _ops.spread_slots(groups, slots, self.num_key_value_heads).flatten(1, 2)

    def _runs_whole_slots(self, count: Tensor, heads: int) -> bool:
        """Whether every sequence runs all ``heads`` heads of its slots. Asking would make the host
        wait for a device, and a graph cannot branch on it."""
        known = count.is_cpu and not torch.compiler.is_compiling()
        return known and count.numel() > 0 and bool((count == heads).all())

    def _merge(self, context: Tensor, weight: Tensor | None) -> Tensor:
        """[B, H, L, d] -> [B, L, D]"""
        if is_own(self.o_proj):
            return _ops.combine_heads(context, weight, self.o_proj.weight, self.o_proj.bias)
        if weight is not None:
            context = context * weight.to(context.dtype)[:, :, None, None]
        return self.o_proj(context.transpose(1, 2).flatten(2))

    def _merge_chosen(self, context: Tensor, chosen: Selection) -> Tensor:
        if not is_own(self.o_proj):
            return self._merge(context, chosen.weight)
        return _ops.selected_output_projection(
            context,
            self.o_proj.weight,
            self.o_proj.bias,
            chosen.index,
            chosen.count,
            chosen.weight,
        )

    def _show(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Tensor,
        weight: Tensor | None,
        masks: Masks,
        padding: Tensor | None,
        self_attention: bool,
    ) -> None:
        """Passes the probe what every head computed."""
        k, v = self._for_each_head(k), self._for_each_head(v)
        q = q * (self.scale * math.sqrt(q.size(3)))  # what the default scale makes the scores
        probe = AttentionProbe(q, k, v, context, weight, *masks, padding, self_attention)
        self._probe(self, probe)

    def _weights(self, q: Tensor, k: Tensor, selection: Selection | None, masks: Masks) -> Tensor:
        """[B, H, L, S], zeros for the heads that did not run."""
        k = self._for_each_head(k)
        weights = _ops.attention_probabilities(q, k, *masks, self.scale, self._added_keys)
        if selection is None:
            return weights
        ran = _ops.selection_mask(selection.index, selection.count, weights.dtype)  # [B, H]
        return weights * ran[:, :, None, None]
