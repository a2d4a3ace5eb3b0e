"""What a grouped-query layer is made of: its projections and sizes, described, fitted, pruned."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise._C import LayerPlan
from headwise.gates.linears import check_read
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.decoder_inputs import epsilon_of, even_groups, set_parameter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class GroupedQuerySizes(AttentionLayer):
    """The part of :class:`headwise.GroupedQueryAttention` that computes nothing."""

    num_key_value_heads: int
    key_value_heads: list[int] | None
    dropout: float
    scale: float
    sliding_window: int | None
    keep_selection: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None
    _place: Tensor | None

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

    @abc.abstractmethod
    def _resized(self, sizes: Mapping[str, Any], **factory: Any) -> Any:
        """A new layer of the same kind, without a gate."""

    def _alike(self, sizes: Mapping[str, Any], **factory: Any) -> Any:
        """:meth:`_resized`, with biases in the projections that have one here: converted attention
        may have biases only in its queries and values (Whisper)."""
        made = self._resized(sizes, **factory)
        for name in PROJECTIONS:
            if getattr(self, name).bias is None:
                getattr(made, name).bias = None
        return made

    def _share_norms(self, other: Any) -> None:
        """Gives a layer with other numbers of heads the norms of this one."""
        other.q_norm, other.k_norm = self.q_norm, self.k_norm

    def fitted(self, described: Mapping[str, Any], name: str = "") -> Any:  # as _resized
        fixed = ("embed_dim", "head_dim", "bias", "scale", "qk_norm_eps")
        self._check_same(described, fixed, name)
        if self.describe() == described:
            return self
        weight = self.o_proj.weight
        fitted = self._alike(described, device=weight.device, dtype=weight.dtype)
        self._share_norms(fitted)
        return fitted.train(self.training)

    def pruned(self, entry: LayerPlan) -> Any:  # as _resized
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
        for name in PROJECTIONS:
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
