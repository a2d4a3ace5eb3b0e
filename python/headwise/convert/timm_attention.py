"""The attention of timm's vision transformers: one projection to queries, keys and values or three,
norms of queries and keys, a rotary embedding of all tokens but the first few (EVA, DINOv3), or a
relative position bias (BEiT).

The converted layer has copies of a common projection's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.masks import split
from headwise.convert.projections import Places, Projected, ProjectedReplacement
from headwise.convert.registry import Architecture
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.proof import Draw, Trial

if TYPE_CHECKING:
    from headwise._C import LayerPlan

PACKED = Places(packed="qkv", output="proj")
APART = Places(output="proj")

#: Of the whole model: a pruned layer reads the columns of its heads.
_BIAS = ("relative_position_bias_table", "relative_position_index")


class SelectedTimmAttention(ProjectedReplacement):
    """Replaces ``timm.layers.Attention`` and classes that are called like it.

    Attributes:
        bias_heads: int64 ``[H]``: the heads of the position bias that are the layer's own.
    """

    places = PACKED
    #: The arguments after the input, in their order.
    ARGUMENTS: tuple[str, ...] = ("attn_mask", "is_causal")

    proj_drop: nn.Module
    bias_heads: Tensor

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        self.proj_drop = original.proj_drop
        for name in _BIAS:
            value = getattr(original, name, None)
            vars(self).pop(name, None)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=False)
        device = None if factory.get("device") == "meta" else factory.get("device")
        self.register_buffer("bias_heads", torch.arange(self.num_heads, device=device))

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        smaller = super().pruned(entry)
        smaller.bias_heads = self.bias_heads[entry.heads]
        return smaller

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:  # type: ignore[override]
        """``x [B, L, D]`` -> ``[B, L, D]``. The other arguments are the original's: ``attn_mask``
        (broadcastable to ``[B, H, L, L]``; boolean, True = may attend, or added to the scores),
        ``is_causal``, ``rope`` and ``shared_rel_pos_bias [heads of the model, L, L]``.

        Raises:
            TypeError: an argument that the original does not have.
            ValueError: a mask for causal attention, or a ``rope`` that differs between heads.
        """
        given = dict(zip(self.ARGUMENTS, arguments, strict=False)) | named
        if len(arguments) > len(self.ARGUMENTS) or not given.keys() <= set(self.ARGUMENTS):
            raise TypeError(
                f"{type(self).__name__} takes x and {', '.join(self.ARGUMENTS)}, got "
                f"{len(arguments)} more by position and {', '.join(named) or 'none'} by name"
            )
        mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
        if mask is not None:
            if causal:
                raise ValueError("attn_mask must be None with is_causal=True")
            mask = mask[(None,) * (4 - mask.dim())]
        call = split(mask, x, causal)
        bias = self._bias(given.get("shared_rel_pos_bias"))
        if bias is not None:
            call = call.with_bias(bias)
        rope = given.get("rope")
        output, _ = GroupedQueryAttention.forward(
            self,
            x,
            None if rope is None else self._angles(rope, x),
            key_padding_mask=call.key_padding_mask,
            query_padding_mask=call.query_padding_mask,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
        )
        return self.proj_drop(output)

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        """What is added to the scores, ``[1, H, L, L]``."""
        table, index = (getattr(self, name) for name in _BIAS)
        bias = None if table is None else table[index].permute(2, 0, 1)[None]
        if shared is not None:
            shared = shared[(None,) * (4 - shared.dim())]
            bias = shared if bias is None else bias + shared
        return None if bias is None else bias.index_select(1, self.bias_heads)

    def _angles(self, rope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """timm's sines and cosines ``[L - first tokens, 2 r]`` -> cosines and sines ``[1, L,
        r]``."""
        if rope.dim() != 2:
            raise ValueError(
                f"rope must have 2 dimensions, the same angles for all heads and sequences, got "
                f"shape {list(rope.shape)}"
            )
        sin, cos = rope.to(x.dtype).chunk(2, dim=-1)
        first = (x.size(1) - rope.size(0), sin.size(1))
        cos = torch.cat([cos.new_ones(first), cos])
        return cos[None], torch.cat([sin.new_zeros(first), sin])[None]

    def _rotate(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        turn, angles = torch.ops.headwise.rotate_heads, position_embeddings
        neighbours = not getattr(self, "rotate_half", False)
        return turn(q, *angles, neighbours), turn(k, *angles, neighbours)


class SelectedTimmRotary(SelectedTimmAttention):
    """Replaces ``timm.layers.AttentionRope`` and ``EvaAttention``."""

    ARGUMENTS = ("rope", "attn_mask", "is_causal")


class SelectedTimmRotaryApart(SelectedTimmRotary):
    """The same with separate projections."""

    places = APART


class SelectedTimmBeit(SelectedTimmAttention):
    """Replaces BEiT's ``Attention``."""

    ARGUMENTS = ("shared_rel_pos_bias",)


class Timm(Projected):
    """Attention of timm."""

    name = "timm"
    children = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
    parameters = ("q_bias", "k_bias", "v_bias", *_BIAS)
    attributes = ("proj_drop",)

    def __init__(self, replacement_class: type[SelectedTimmAttention], apart: Timm | None = None):
        self.places = replacement_class.places
        self._replacement_class, self._apart = replacement_class, apart

    def of(self, module: nn.Module) -> Architecture:
        packed = getattr(module, "qkv", None)
        return self if packed is not None or self._apart is None else self._apart

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        heads = module.num_heads
        return {
            "num_heads": heads,
            "num_key_value_heads": getattr(module, "num_kv_heads", heads),
            "head_dim": module.proj.in_features // heads,
            "dropout": module.attn_drop.p,
            "scale": module.scale,
        }

    def refusal(self, module: nn.Module) -> str | None:
        if getattr(module, "gate", None) is not None:
            return "it multiplies the outputs of its heads by gates of its own (gated=True)"
        if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
            return (
                "it normalises the outputs of all heads together (scale_norm=True), so that "
                "none can be left out"
            )
        return super().refusal(module)

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> SelectedTimmAttention:
        replacement = self._replacement_class(module, sizes, device="meta")
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name, None)
            setattr(replacement, name, None if isinstance(norm, nn.Identity) else norm)
        return replacement

    def convert(self, module: nn.Module) -> tuple[nn.Module, GroupedQueryAttention]:
        replacement, layer = super().convert(module)
        if getattr(module, "q_bias", None) is not None:  # that of the keys is always zero
            layer.q_proj.bias, layer.v_proj.bias = module.q_bias, module.v_bias
        return replacement, layer

    def trial(self, module: nn.Module) -> Trial:
        index = getattr(module, "relative_position_index", None)
        length = 5 if index is None else index.size(0)
        width, heads = module.proj.out_features, module.num_heads
        rotary = self._replacement_class.ARGUMENTS

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            tokens = draw(2, length, width)
            calls: list[dict[str, Any]] = [{}]
            if "attn_mask" in rotary:
                unseen = draw.padding(2, length)[:, None, None, :].expand(-1, -1, length, -1)
                calls += [{"attn_mask": ~unseen}, {"attn_mask": draw.added(unseen)}]
            if "rope" in rotary:
                first = own.num_prefix_tokens
                pairs = draw.rope(length + 2, module.head_dim)[::-1]
                angles = torch.cat([pair[0] for pair in pairs], dim=-1)
                calls += [{"rope": angles[: length - first]}]
            if "shared_rel_pos_bias" in rotary:
                calls += [{"shared_rel_pos_bias": draw(heads, length, length)}]
            return [own(tokens, **call) for call in calls]

        return run


_ROTARY = Timm(SelectedTimmRotary, Timm(SelectedTimmRotaryApart))
_PLAIN, _BEIT = Timm(SelectedTimmAttention), Timm(SelectedTimmBeit)


class _OfTimm(Architecture):
    """Chooses by class."""

    name = "timm"

    def of(self, module: nn.Module) -> Architecture:
        if hasattr(module, "num_prefix_tokens"):
            return _ROTARY.of(module)
        return _BEIT if hasattr(module, "qkv_bias_separate") else _PLAIN

    def refusal(self, module: Any) -> str | None:
        return self.of(module).refusal(module)

    def convert(self, module: Any) -> tuple[nn.Module, GroupedQueryAttention]:
        raise NotImplementedError


ARCHITECTURE = _OfTimm()
