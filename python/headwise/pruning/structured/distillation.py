"""Layers of a pruned model learning from layers of a teacher (CoFi, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LayerOutputs:
    """A context that keeps the outputs of some modules, in their order.

    Attributes:
        values: ``[B, L, D]`` of each module, of the last forward.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.values: list[Tensor] = []
        self._handles: list = []

    def __enter__(self) -> LayerOutputs:
        self.values = []
        for module in self.modules:
            self._handles.append(module.register_forward_hook(self._keep))
        return self

    def _keep(self, module: nn.Module, args: tuple, output) -> None:
        self.values.append(output[0] if isinstance(output, tuple) else output)

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __deepcopy__(self, memo: dict) -> LayerOutputs:
        copied = LayerOutputs([memo.get(id(module), module) for module in self.modules])
        memo[id(self)] = copied
        return copied


def layer_distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], transform: nn.Module, alive: Tensor
) -> Tensor:
    """Sum over the teacher's layers of the mean squared error to the student's matched layer.

    Args:
        student: S tensors ``[B, L, D]``.
        teacher: T tensors ``[B, L, D]``.
        transform: of the student's, ``[..., D] -> [..., D]``.
        alive: bool ``[S]``: layers that may be matched.

    Returns:
        A scalar; 0 if no layer is alive.
    """
    mapped = [transform(x) for x in student]
    errors = torch.stack(
        [torch.stack([(own - other).square().mean() for own in mapped]) for other in teacher]
    )  # [T, S]
    matched = torch.ops.headwise.match_layers(errors, alive)  # [T]
    chosen = errors.gather(1, matched.clamp_min(0)[:, None])[:, 0]  # [T]
    return (chosen * (matched >= 0)).sum()
