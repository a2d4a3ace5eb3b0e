"""Attention of decoders: grouped key/value heads, rotary positions, a cache, chosen heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise import _C
from headwise._C import LayerPlan
from headwise.gates.base import Gate
from headwise.gates.linears import check_read
from headwise.gates.recomputation import recomputing
from headwise.gates.selection import Selection
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.decoder_inputs import (
    Masks,
    align,
    check_cache,
    check_group_sizes,
    check_inputs,
    check_keys,
    check_memory,
    epsilon_of,
    even_groups,
    hide,
    is_own,
    is_rms_norm,
    linear,
    set_parameter,
    with_added_keys,
)
from headwise.nn.key_value_cache import KeyValueCache, LayerCache
from headwise.nn.visible_keys import attend_every_head

_ops = torch.ops.headwise


class GroupedQueryAttention(AttentionLayer, nn.Module):
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

    DESCRIBED = {
        "embed_dim": int,
        "num_heads": int,
        "num_key_value_heads": int,
        "head_dim": int,
        "dropout": (int, float),
        "bias": bool,
        "output_bias": bool,
        "scale": (int, float),
        "qk_norm_eps": (int, float, type(None)),
        "sliding_window": (int, type(None)),
        "key_value_heads": (list, type(None)),
        "keep_selection": bool,
    }

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

    def _set_place(self, device: Any) -> None:
        heads = self.key_value_heads
        place = None if heads is None else torch.tensor(heads, device=device)  # [H]
        self.register_buffer("_place", place, persistent=False)

    @property
    def output_projection(self) -> nn.Module:
        return self.o_proj

    @property
    def value_bias(self) -> Tensor | None:
        check_read("v_proj", self.v_proj)
        return self.v_proj.bias

    @property
    def head_groups(self) -> list[int]:
        if self.key_value_heads is not None:
            return self.key_value_heads
        return even_groups(self.num_heads, self.num_key_value_heads)

    def describe(self) -> dict[str, Any]:
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "dropout": self.dropout,
            "bias": self.q_proj.bias is not None,
            "output_bias": self.o_proj.bias is not None,
            "scale": self.scale,
            "qk_norm_eps": epsilon_of(self.q_norm),
            "sliding_window": self.sliding_window,
            "key_value_heads": self.key_value_heads,
            "keep_selection": self.keep_selection,
        }

    @property
    def variant(self) -> str | None:
        own = type(self)
        steps = ("_project", "_rotate", "_scored", "_filtered", "_weights")
        other = any(getattr(own, s) is not getattr(GroupedQueryAttention, s) for s in steps)
        norms = (norm for norm in (self.q_norm, self.k_norm) if norm is not None)
        return own.__name__ if other or not all(map(is_rms_norm, norms)) else None

    def _resized(self, sizes: Mapping[str, Any], **factory: Any) -> GroupedQueryAttention:
        """A new layer of the same kind."""
        return GroupedQueryAttention(**sizes, **factory)

    def _alike(self, sizes: Mapping[str, Any], **factory: Any) -> GroupedQueryAttention:
        """:meth:`_resized`, with biases in the projections that have one here: converted attention
        may have biases only in its queries and values (Whisper)."""
        made = self._resized(sizes, **factory)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if getattr(self, name).bias is None:
                getattr(made, name).bias = None
        return made

    def _share_norms(self, other: GroupedQueryAttention) -> None:
        """Gives a layer with other numbers of heads the norms of this one."""
        other.q_norm, other.k_norm = self.q_norm, self.k_norm

    def fitted(self, described: Mapping[str, Any], name: str = "") -> GroupedQueryAttention:
        fixed = ("embed_dim", "head_dim", "bias", "scale", "qk_norm_eps")
        self._check_same(described, fixed, name)
        if self.describe() == described:
            return self
        weight = self.o_proj.weight
        fitted = self._alike(described, device=weight.device, dtype=weight.dtype)
        self._share_norms(fitted)
        return fitted.train(self.training)

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        """See :meth:`AttentionLayer.pruned`. Key/value heads that no kept head reads are removed
        too; if the remaining groups differ in size, ``key_value_heads`` maps query heads to
        them."""
        groups = self.head_groups
        kept = sorted({groups[head] for head in entry.heads})
        sizes = {
            **self.describe(),
            "num_heads": len(entry.heads),
            "num_key_value_heads": len(kept),
            "key_value_heads": [kept.index(groups[head]) for head in entry.heads],
        }
        smaller = self._alike(sizes, device="meta")
        self._share_norms(smaller)
        smaller._set_place(self.o_proj.weight.device)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            check_read(name, getattr(self, name))
        shared = LayerPlan(entry.name, self.num_key_value_heads, kept)
        for name, own in (("q_proj", entry), ("k_proj", shared), ("v_proj", shared)):
            for kind, old in getattr(self, name).named_parameters():
                rows = old if old.dim() == 2 else old[:, None]
                left = _C.prune_projections({"q_proj_weight": rows}, own)["q_proj_weight"]
                set_parameter(
                    getattr(smaller, name), kind, left.reshape(left.size(0), *old.shape[1:]), old
                )
        weight = self.o_proj.weight
        columns = _C.prune_projections({"out_proj.weight": weight}, entry)["out_proj.weight"]
        set_parameter(smaller.o_proj, "weight", columns, weight)
        if self.o_proj.bias is not None:
            set_parameter(
                smaller.o_proj, "bias", self.o_proj.bias.detach().clone(), self.o_proj.bias
            )
        return smaller.train(self.training)

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
