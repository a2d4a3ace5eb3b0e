"""Giving memory to a model that was built on the meta device, before its tensors are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers


def materialise(model: nn.Module, fresh: Callable[[], nn.Module | None]) -> bool:
    """Moves the tensors of ``model`` on the meta device to the CPU, in place; returns whether there
    were any.

    Tensors in its state become zeros, which the caller fills; tied parameters stay tied, also those
    that only their class ties. A buffer that is not in its state gets the values of a fresh model.

    Args:
        fresh: makes a model of the same architecture on a device, or None if that is not possible.

    Raises:
        ValueError: a buffer has unknown values.
    """
    for layer in attention_layers(model).values():
        if layer.output_projection.weight.is_meta:
            layer.set_gate(None)  # it gets the file's gate
            if isinstance(layer, GroupedQueryAttention):
                layer._set_place("cpu")
    _tie(model)
    held = [
        (f"{prefix}.{name}" if prefix else name, tensors, name)
        for prefix, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for name in tensors
    ]
    held = [(full, t, name) for full, t, name in held if t[name] is not None and t[name].is_meta]
    if not held:
        return False
    saved = set(model.state_dict(keep_vars=True))
    unsaved = {full for full, _, _ in held} - saved
    known: dict[str, Tensor] = {}
    if unsaved:
        made = fresh()
        known = {} if made is None else dict(made.named_buffers())
    for full in sorted(unsaved):
        if full not in known:
            raise ValueError(
                f"model has the buffer '{full}' on the meta device, and it is in no file: build "
                f"the model on a device"
            )
    replaced: dict[int, Tensor] = {}
    for full, tensors, name in held:
        old = tensors[name]
        if id(old) not in replaced:
            if full in unsaved:
                new = known[full].detach().clone()
            else:
                new = torch.zeros(old.shape, dtype=old.dtype, device="cpu")
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            replaced[id(old)] = new
        tensors[name] = replaced[id(old)]
    return True


def _tie(model: nn.Module) -> None:
    """Ties what the classes of transformers tie: on the meta device some versions do not."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None:
        return
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            if any(parameter.is_meta for parameter in part.parameters()):
                part.tie_weights()
