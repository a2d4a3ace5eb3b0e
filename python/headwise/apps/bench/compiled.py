"""The dense layer under torch.compile, and FlexAttention with a mask of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.apps.bench.contenders import Layer, compare, dense

COMPILED, FLEX = "torch.compile", "FlexAttention"


def compiled_forms(
    layer: Layer, mask: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The forms that work here, and the reasons for the others.

    Args:
        mask: [B, H], weights of the chosen heads, 0 elsewhere.
    """
    forms: dict[str, Callable[[], Tensor]] = {}
    notes: dict[str, str] = {}
    for name, build in ((COMPILED, _compiled), (FLEX, _flex)):
        try:
            torch._dynamo.reset()
            form, weight = build(layer, mask)
            with torch.no_grad():
                want = dense(layer.x.double(), layer.weights.to(torch.float64), weight)
                compare(form(), want, layer.dtype)
            if layer.training:
                form().sum().backward()
            forms[name] = form
        except Exception as error:  # no compiler, or a case that this torch does not compile
            lines = str(error).strip().splitlines() or [type(error).__name__]
            notes[name] = lines[0][:200]
    return forms, notes


def _compiled(layer: Layer, _: Tensor) -> tuple[Callable[[], Tensor], None]:
    function = torch.compile(dense, dynamic=False)
    return lambda: function(layer.x, layer.weights), None


def _flex(layer: Layer, mask: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Projects all heads; only the attention of those that were not chosen is skipped.

    The mask of blocks is made in every call, because every call makes a new choice.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    chosen = mask != 0  # [B, H]
    shape, w = layer.shape, layer.weights

    def runs(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return chosen[b, h]

    def form() -> Tensor:
        blocks = create_block_mask(
            runs, shape.batch, shape.heads, shape.length, shape.length, device=str(layer.device)
        )
        q, k, v = (
            part.unflatten(2, (w.heads, -1)).transpose(1, 2)  # [B, H, L, d]
            for part in F.linear(layer.x, w.in_weight, w.in_bias).chunk(3, dim=2)
        )
        context: Any = attend(q, k, v, block_mask=blocks)
        return F.linear(context.transpose(1, 2).flatten(2), w.out_weight, w.out_bias)

    return form, chosen.double()
