"""Attention whose projections are linear layers of their own, which quantizers find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.selection import Selection
from headwise.io.printable import layer_called
from headwise.nn.attention_inputs import AttentionInputs
from headwise.nn.layers import (
    attention_layers,
    carry_hooks,
    check_replaceable,
    replace_module,
)
from headwise.nn.multihead_attention import MultiheadAttention

__all__ = ["split_projections"]

_ops = torch.ops.headwise
_ONCE = "split the projections of a copy (copy.deepcopy), and keep the model as it was"


def split_projections(model: nn.Module) -> nn.Module:
    """Gives every :class:`headwise.MultiheadAttention` of ``model``, in place, four
    ``torch.nn.Linear``: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Quantizers replace layers by their type, and the joined projections of an attention layer are
    not one of theirs. Afterwards ``quantize_dynamic(model, {nn.Linear})`` and torchao's
    ``quantize_`` reach them, in pruned and in gated layers. (A
    :class:`headwise.GroupedQueryAttention` has such layers anyway.) Gates stay in floating point.

    What a gate saves then: the attention of heads that were not chosen, but not their
    projections, which are computed for all heads.

    Args:
        model: is changed; for inference only, since the new weights are copies. It can no longer
            be saved or pruned: do that before.

    Returns:
        ``model``; the new layer, if the model is itself one.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or an output projection was replaced (by
            an adapter).
        ValueError: ``model`` has no attention layer, or one of them has ``bias_k``,
            ``add_zero_attn`` or a gate that is a bank of plans. The model is then unchanged.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no attention layer: call headwise.convert first"
        )
    split = [
        (layer, SplitAttention(name, layer))
        for name, layer in layers.items()
        if isinstance(layer, MultiheadAttention)
        and not isinstance(layer, SplitAttention)
        and layer.num_heads > 0
    ]
    for old, new in split:
        carry_hooks(old, new)
        model = replace_module(model, old, new)
    return model


class SplitAttention(MultiheadAttention):
    """See :func:`split_projections`."""

    def __init__(self, name: str, layer: MultiheadAttention) -> None:
        if layer._added_keys:
            raise ValueError(f"{layer_called(name)} adds keys of its own (bias_k or add_zero_attn)")
        if layer.gate is not None and layer.gate.projects:
            raise ValueError(
                f"{layer_called(name)} has a {type(layer.gate).__name__}, which has output "
                "projections of its own"
            )
        if layer.gate is not None and layer.gate.routes_tokens:
            raise ValueError(
                f"{layer_called(name)} has a {type(layer.gate).__name__} that chooses for every "
                "token: give it routing='sequence'"
            )
        check_replaceable(layer)
        layer.check_projections()
        nn.Module.__init__(self)
        for key, value in vars(layer).items():  # sizes and options
            if not key.startswith("_") and key not in ("training",):
                setattr(self, key, value)
        self._same_embed_dim = layer._same_embed_dim
        for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(key, None)
        self.register_parameter("in_proj_bias", None)
        self.bias_k = self.bias_v = None
        weights = layer._projections()
        for place, key in enumerate(("q_proj", "k_proj", "v_proj")):
            setattr(self, key, _linear(weights[place], weights[place + 3]))
        self.out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias)  # type: ignore[assignment]
        self._init_choosing(layer.gate)
        self.train(layer.training)

    @property
    def _is_plain(self) -> bool:
        return False  # the parameters of torch's module are not there

    def check_projections(self) -> None:
        """Projections are called, so they may be of any kind."""

    def describe(self) -> dict[str, Any]:
        raise ValueError(f"a layer with split projections cannot be saved or pruned: {_ONCE}")

    def _project(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        def heads(linear: nn.Module, x: Tensor) -> Tensor:  # [B, S, D] -> [B, H, S, d]
            if x.size(1) == 0:  # torchao does not take it
                return x.new_zeros(x.size(0), self.num_heads, 0, self.head_dim)
            return linear(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        q, k = heads(self.q_proj, inputs.query), heads(self.k_proj, inputs.key)
        return q, k, heads(self.v_proj, inputs.value)

    def _combine(self, context: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            context = context * weight.to(context.dtype)[:, :, None, None]
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def _run_selected(self, inputs: AttentionInputs, selection: Selection) -> Tensor:
        q, k, v = self._project(inputs)
        context = _ops.selected_attention(
            q, k, v, selection.index, selection.count, None, *self._masks(inputs)
        )
        return self._combine(context, selection.weight)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    made = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
