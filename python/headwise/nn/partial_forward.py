"""Ending a forward early, and finding the tokens that it depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stop(BaseException):
    """Ends a forward early; no handler in a model's own code catches it."""


def tokens_read(module: nn.Module, run: Callable[[], Tensor | None]) -> Tensor | None:
    """bool ``[B, L]``: the tokens of the output of ``module`` that the scalar ``run()`` has a
    gradient for; None if it has none."""
    leaves: list[Tensor] = []

    def leaf(module: nn.Module, args: tuple, output: Any) -> Any:
        whole = isinstance(output, tuple)
        leaves.append((output[0] if whole else output).detach().requires_grad_())
        return (leaves[-1], *output[1:]) if whole else leaves[-1]

    with module.register_forward_hook(leaf), torch.enable_grad():
        total = run()
        if total is None or not total.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(total, leaves[-1:])
    return (gradient != 0).any(-1)
