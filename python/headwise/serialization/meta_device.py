"""Giving memory to a model that was built on the meta device, before its tensors are loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers


def materialise(model: nn.Module, fresh: Callable[[], nn.Module | None]) -> bool:
    """Puts what of ``model`` is on the meta device on the CPU, in place; returns whether any was.

    What is in its state becomes zeros, for the caller to fill; tied parameters stay tied. A buffer
    that is not in its state gets the values that it has in a fresh model.

    Args:
        fresh: makes a model of the same architecture on a device, or None where nobody can.

    Raises:
        ValueError: a buffer has values that nobody knows.
    """
    for layer in attention_layers(model).values():
        if layer.output_projection.weight.is_meta:
            layer.set_gate(None)  # the file says which it gets
            if isinstance(layer, GroupedQueryAttention):
                layer._set_place("cpu")
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
