"""Attention of decoders: grouped key/value heads, rotary positions, a cache, chosen heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.base import Gate
from headwise.gates.recomputation import recomputing
from headwise.gates.selection import Selection
from headwise.nn.decoder_inputs import (
    align,
    check_cache,
    check_group_sizes,
    check_inputs,
    check_keys,
    check_memory,
    even_groups,
    hide,
    linear,
)
from headwise.nn.grouped_query_steps import GroupedQuerySteps
from headwise.nn.key_value_cache import KeyValueCache, LayerCache

_ops = torch.ops.headwise


class GroupedQueryAttention(GroupedQuerySteps, nn.Module):
    r"""Causal self-attention in which groups of query heads share keys and values.

    Ainslie et al. 2023 (arXiv 2305.13245): query head h attends to key/value head
    :math:`g(h) = \lfloor h\,H_{kv} / H \rfloor`; :math:`H_{kv} = H` is multi-head attention and
    :math:`H_{kv} = 1` multi-query attention. With a gate, every input, and in decoding every step,
    chooses its *query* heads,

    .. math:: y = W_O\,[w_1 A_1(x), \dots, w_H A_H(x)] + b_O

    where :math:`w_h` is 0 for a head that was not chosen: in evaluation, its query projection, its
    attention and its share of the output projection are not computed. Keys and values that a later
    step may need always are. :class:`headwise.GroupGate` chooses whole groups.

    The gate sees the tokens of the call: the prompt, then each step's token. **In training on whole
    sequences it therefore sees, through its pooling, tokens that a causal model must not see yet**;
    :func:`headwise.gates_see` limits what it sees to the prompt or the first tokens.

    Args:
        embed_dim: width of the model, D.
        num_heads: query heads, H.
        num_key_value_heads: key/value heads, Hkv; divides H. Default: H.
        head_dim: width of a head, d; default ``embed_dim / num_heads``.
        dropout: dropout probability on the attention probabilities.
        bias: whether the query, key and value projections have a bias.
        output_bias: whether the output projection has a bias; default: as ``bias``.
        scale: of the scores; default ``head_dim ** -0.5``.
        qk_norm_eps: epsilon of an RMS norm over each head of the queries and the keys, before they
            are rotated (Qwen3); None: no norm.
        sliding_window: in causal calls, a query sees the last ``sliding_window`` keys, including
            its own; None: all.
        key_value_heads: the key/value head of each query head, ascending, if groups differ in size
            (a pruned layer); default: groups of ``H / Hkv``.
        keep_selection: with a cache, choose once, when it is empty (the prompt), and keep that
            choice for all later steps. Keys and values that no chosen head reads are then not
            computed, and the cache holds only the key/value heads of the sequence in the batch that
            reads the most.
        gate: a gate; an unbound one is bound to this layer's sizes.
        device: of the parameters.
        dtype: of the parameters.

    Parameters ``q_proj.weight [H d, D]``, ``k_proj.weight`` and ``v_proj.weight [Hkv d, D]``,
    ``o_proj.weight [D, H d]``, their ``bias``, and with ``qk_norm_eps`` ``q_norm.weight`` and
    ``k_norm.weight [d]``. A projection that was replaced (by an adapter or a quantized one) or has
    hooks is called as it is, for all heads.

    Raises:
        ValueError: sizes that are not positive, ``num_key_value_heads`` that does not divide
            ``num_heads``, ``key_value_heads`` that leave one out, or a gate bound to other sizes or
            that reads queries and keys.

    Example:
        >>> layer = GroupedQueryAttention(576, 9, 3, gate=BudgetGate(keep=0.5))
        >>> y, _ = layer(x, (cos, sin), cache=cache)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        output_bias: bool | None = None,
        *,
        scale: float | None = None,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        key_value_heads: Sequence[int] | None = None,
        keep_selection: bool = False,
        gate: Gate | None = None,
        device=None,
        dtype=None,
    ) -> None:
        nn.Module.__init__(self)  # a subclass may also derive from the module that it replaces
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        check_group_sizes(embed_dim, num_heads, groups, head_dim, dropout, key_value_heads)
        if sliding_window is not None and sliding_window <= 0:
            raise ValueError(f"sliding_window must be positive or None, got {sliding_window}")
        factory = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_key_value_heads = groups
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout = dropout
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.sliding_window = sliding_window
        self.keep_selection = keep_selection
        heads = None if key_value_heads is None else [int(group) for group in key_value_heads]
        if groups == 0 or (num_heads % groups == 0 and heads == even_groups(num_heads, groups)):
            heads = None
        #: The key/value head of each query head; None if groups are of one size.
        self.key_value_heads: list[int] | None = heads
        self._set_place(device)

        width, shared = num_heads * self.head_dim, groups * self.head_dim
        self.q_proj = linear(embed_dim, width, bias, factory)
        self.k_proj = linear(embed_dim, shared, bias, factory)
        self.v_proj = linear(embed_dim, shared, bias, factory)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = linear(width, embed_dim, output_bias, factory)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **factory)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **factory)
        self._seen: Tensor | int | None = None  # see headwise.gates_see
        self._init_choosing(gate)

    def _resized(self, sizes: Mapping[str, Any], **factory: Any) -> GroupedQueryAttention:
        """A new layer of the same kind."""
        return GroupedQueryAttention(**sizes, **factory)

    def trial_cache(self) -> Callable[[Tensor], LayerCache]:
        """An empty cache of the kind that this layer's model passes: for a call with ``x`` ``[B, L,
        D]``."""
        cache = KeyValueCache()
        return lambda x: cache

    def set_gate(self, gate: Gate | None) -> None:
        """As :meth:`AttentionLayer.set_gate`.

        Raises:
            ValueError: also for a gate that reads queries and keys (:class:`ThresholdGate`) or
                chooses for every token.
        """
        if isinstance(gate, Gate) and gate.reads_heads:
            raise ValueError(
                f"gate must choose by the layer's input, and a {type(gate).__name__} reads queries "
                f"and keys, which a layer with a cache does not have of every head"
            )
        if isinstance(gate, Gate) and gate.routes_tokens:
            raise ValueError(
                f"gate must choose for every sequence in a layer with a cache, and this "
                f"{type(gate).__name__} does for every token: give it routing='sequence'"
            )
        super().set_gate(gate)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_key_value_heads={self.num_key_value_heads}, head_dim={self.head_dim}"
        )

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the chosen heads over the tokens so far, or over another sequence.

        S is L, the tokens of this call, or with a cache all tokens that it holds after it; in
        cross-attention S is the length of ``memory``.

        Args:
            x: ``[B, L, D]``.
            position_embeddings: cosines and sines of the rotary embedding (Su et al. 2021, arXiv
                2104.09864), each ``[B or 1, L, r]``: the first r features of each head of the
                queries and keys are rotated, feature i with feature ``i + r/2``. None: no rotation.
            key_padding_mask: ``[B, S]``; boolean (True = padding) or floating (added to scores).
            query_padding_mask: boolean ``[B, L]``: which tokens of this call are padding; the gate
                does not see them. Default: the last L columns of ``key_padding_mask``; in
                cross-attention none.
            attn_mask: broadcastable to ``[B, H, L, S]``; boolean (True = may not attend) or
                floating (added to the scores).
            is_causal: a query sees the keys up to its own, with the last query aligned to the last
                key (and with ``sliding_window`` only the last ones); False if ``attn_mask`` does
                this.
            cache: stores this call's keys and values and returns those of all tokens; in
                cross-attention those of ``memory``, computed in the first call only.
            memory: ``[B, S, D]``: cross-attention, keys and values are those of this sequence, and
                ``is_causal`` must be False.
            need_weights: also return the attention weights, before dropout; zeros for heads that
                did not run.

        Returns:
            The output ``[B, L, D]``, and the weights ``[B, H, L, S]`` or None.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: a mask of the wrong type, or what is not a cache. After any error a
                :class:`KeyValueCache` is as it was before the call.
        """
        check_inputs(self, x, position_embeddings, key_padding_mask, query_padding_mask, attn_mask)
        if memory is not None:
            check_memory(self, x, memory, is_causal, position_embeddings)
        check_cache(cache)
        held = None if memory is None or cache is None else cache.held()
        if key_padding_mask is not None or attn_mask is not None:
            keys = x.size(1) if memory is None else memory.size(1)
            if held is not None:
                keys = held[0].size(2)
            elif memory is None and cache is not None:
                keys = cache.num_keys(keys)
            check_keys(self, x, keys, key_padding_mask, attn_mask)
        before = cache.state() if isinstance(cache, KeyValueCache) else None
        try:
            return self._run(
                x,
                position_embeddings,
                key_padding_mask,
                query_padding_mask,
                attn_mask,
                is_causal,
                cache,
                held,
                memory,
                need_weights,
            )
        except BaseException:
            if before is not None and isinstance(cache, KeyValueCache):
                cache.restore(before)
            raise

    def _run(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        cache: LayerCache | None,
        held: tuple[Tensor, Tensor] | None,
        memory: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` of arguments that fit; ``held``: what a cache has of ``memory``."""
        length = x.size(1)
        padding = query_padding_mask
        if padding is None and key_padding_mask is not None and memory is None:
            padding = key_padding_mask[:, -length:]
        selection = self._select(x, padding, cache)
        bank = self.gate if self.gate is not None and self.gate.projects else None
        mixed = cache is not None and getattr(selection, "mixed", False)
        if (
            bank is not None
            and selection is not None
            and self._probe is None
            and not mixed
            and bank.can_pack(self, selection)
        ):
            call = (position_embeddings, key_padding_mask, padding, attn_mask, is_causal, memory)
            return self._run_bank(bank, x, selection, call, cache, need_weights)
        every = (
            (bank is not None and not mixed)
            or selection is None
            or self._probe is not None
            or (self.training and getattr(self.gate, "execution", "selected") == "all")
        )
        chosen = None if every else selection

        q = self._project(self.q_proj, x, self.num_heads, self.q_norm, chosen)  # [B, H, L, d]
        shared = self.num_key_value_heads
        slots = cache.slots if cache is not None and (self.keep_selection or mixed) else None
        if held is not None:
            k, v = held if shared else self._no_heads(held[0])
        else:
            groups = self._groups(chosen, cache)
            tokens = x if memory is None else memory
            k = self._project(self.k_proj, tokens, shared, self.k_norm, groups)  # [B, Hkv, S, d]
            v = self._project(self.v_proj, tokens, shared, None, groups)  # [B, Hkv, S, d]
            if position_embeddings is not None:
                q, k = self._rotate(q, k, position_embeddings)
            if slots is not None:
                k, v = _ops.take_slots(k, slots), _ops.take_slots(v, slots)  # [B, K, S, d]
            if cache is not None:
                k, v = self._cached(cache, k, v)  # [B, Hkv or K, S, d]
        if slots is not None and (chosen is None or need_weights):
            k, v = _ops.spread_slots(k, slots, shared), _ops.spread_slots(v, slots, shared)
            slots = None
        masks = align(q, k, key_padding_mask, attn_mask, is_causal, self.sliding_window)
        q, k, v, masks = self._scored(q, k, v, masks, chosen, slots)

        weight = None if selection is None else selection.weight
        if chosen is None:
            context = self._filtered(self._attend(q, k, v, masks), x, None)  # [B, H, L, d]
            if self._probe is not None and not recomputing():
                self._show(q, k, v, context, weight, masks, padding, memory is None)
        else:
            context = self._attend_chosen(q, k, v, chosen, masks, slots)
            context = self._filtered(context, x, chosen)
        if bank is not None:
            output = bank.project(context, selection)
        elif chosen is None:
            output = self._merge(context, weight)
        else:
            output = self._merge_chosen(context, chosen)
        weights = self._weights(q, k, selection, masks) if need_weights else None
        return output, weights

    def _select(
        self, x: Tensor, padding: Tensor | None, cache: LayerCache | None
    ) -> Selection | None:
        """The gate's choice, or the one that the cache kept; observers are called."""
        if self.gate is None:
            return None
        padding = hide(padding, self._seen, x)
        keeping = cache if self.keep_selection or self.gate.projects else None
        selection = None if keeping is None else keeping.selection
        if selection is None:
            if keeping is not None and isinstance(cache, KeyValueCache) and len(cache) > 0:
                raise ValueError(
                    f"cache has {len(cache)} tokens and no selection of heads for them: with "
                    f"keep_selection=True begin with an empty one"
                )
            selection = self.gate(x, padding)
            if keeping is not None:
                keeping.selection = selection
                together = False  # as a layer of the heads of one plan of a bank
                if self.gate.projects:
                    selection.mixed = len(self.gate.groups(selection)) > 1
                    together = not selection.mixed
                keeping.slots = None if together else self._slots(selection)
        if self._observers and not recomputing():
            for observer in tuple(self._observers):
                observer(self, selection, x, padding)
        return selection

    def _run_bank(
        self,
        bank: Gate,
        x: Tensor,
        selection: Selection,
        call: tuple,
        cache: LayerCache | None,
        maps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The sequences of each plan together, by a dense layer of the plan's heads."""
        groups = bank.groups(selection)
        rope, key_padding, padding, mask, is_causal, memory = call
        output: Any = None
        weights: Any = None
        for plan, rows in groups:
            heads = bank.plans[plan]
            every = slice(None) if rows is None else rows

            def part(tensor: Tensor, every: Any = every) -> Tensor:
                return tensor if tensor.size(0) == 1 else tensor[every]

            own = mask
            if mask is not None and mask.dim() == 4:
                own = part(mask)
                own = own[:, heads] if own.size(1) > 1 else own
            y, maps_of_plan = GroupedQueryAttention.forward(  # not the subclass's forward
                bank.packed(self, plan),
                x[every],
                None if rope is None else (part(rope[0]), part(rope[1])),
                key_padding_mask=None if key_padding is None else key_padding[every],
                query_padding_mask=None if padding is None else padding[every],
                attn_mask=own,
                is_causal=is_causal,
                cache=cache,
                memory=None if memory is None else part(memory),
                need_weights=maps,
            )
            if output is None:
                output = y.new_empty(x.shape)
            output[every] = y
            if maps_of_plan is not None:
                if weights is None:
                    shape = (len(x), self.num_heads, *maps_of_plan.shape[2:])
                    weights = maps_of_plan.new_zeros(shape)
                whole = weights[every]
                whole[:, heads] = maps_of_plan
                weights[every] = whole
        return output, weights
