"""Parameters computed from others, and new modules in the mode of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def remade(
    sources: Sequence[nn.Parameter], function: Callable[[Sequence[Tensor]], Tensor]
) -> nn.Parameter:
    """A parameter computed from others, with their gradients, their ``requires_grad``, and the mark
    that transformers sets on initialised parameters."""
    first = sources[0]
    with torch.no_grad():
        made = nn.Parameter(function([p.detach() for p in sources]), first.requires_grad)
        if any(p.grad is not None for p in sources):
            made.grad = function(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in sources]
            )
    if all(getattr(p, _INITIALISED, False) for p in sources):
        setattr(made, _INITIALISED, True)
    return made


def in_the_mode_of(old: nn.Module, *new: nn.Module) -> None:
    """Gives new modules, but not their children, the mode of ``old``, and transformers' mark that
    their weights need no initialisation."""
    for module in new:
        module.training = old.training
        if getattr(old, _INITIALISED, False):
            setattr(module, _INITIALISED, True)


_INITIALISED = "_is_hf_initialized"
