"""Adapters between a pruned residual stream and full-width neighbours.

Each has the remaining dimensions as a buffer, so that they are saved with the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn.layers import carry_hooks


def _dimensions(kept: int, device) -> Tensor:
    return torch.zeros(kept, dtype=torch.long, device=device)


def widen(x: Tensor, dimensions: Tensor, size: int) -> Tensor:
    """``[..., D']`` -> ``[..., D]``: zeros in the pruned dimensions."""
    return x.new_zeros(*x.shape[:-1], size).index_copy(-1, dimensions, x)


class NarrowTransformerEncoder(nn.TransformerEncoder):
    """A ``torch.nn.TransformerEncoder`` of D' dimensions between neighbours of D.

    Attributes:
        dimensions: int64 ``[D']``: the dimensions of the input that it reads and of the output that
            it writes.
        scale: ``[D']``: multiplies its input.
        size: D.
    """

    dimensions: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.TransformerEncoder, kept: int, size: int) -> None:
        nn.Module.__init__(self)
        self.layers, self.norm = encoder.layers, encoder.norm
        self.num_layers = encoder.num_layers
        self.enable_nested_tensor = self.use_nested_tensor = False
        self.mask_check = encoder.mask_check
        self.size = size
        parameter = next(encoder.parameters())
        self.register_buffer("dimensions", _dimensions(kept, parameter.device))
        self.register_buffer(
            "scale", torch.ones(kept, dtype=parameter.dtype, device=parameter.device)
        )
        carry_hooks(encoder, self)
        self.train(encoder.training)

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """src [..., D] -> [..., D]; arguments as of ``torch.nn.TransformerEncoder``."""
        narrow = src.index_select(-1, self.dimensions) * self.scale.to(src.dtype)  # [..., D']
        return widen(super().forward(narrow, *args, **kwargs), self.dimensions, self.size)


class _NarrowLayerNorm(nn.LayerNorm):
    dimensions: Tensor

    def __init__(self, norm: nn.LayerNorm, kept: int, size: int) -> None:
        like: dict[str, Any] = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        super().__init__(kept, norm.eps, bias=norm.bias is not None, **like)
        self.size = size
        self.register_buffer("dimensions", _dimensions(kept, norm.weight.device))
        carry_hooks(norm, self)
        self.train(norm.training)


class SelectingLayerNorm(_NarrowLayerNorm):
    """``[..., D]`` -> ``[..., D']``: after tied embeddings, which stay wide.

    Attributes:
        scale: ``[D']``: multiplies its input.
    """

    scale: Tensor

    def __init__(self, norm: nn.LayerNorm, kept: int, size: int) -> None:
        super().__init__(norm, kept, size)
        self.register_buffer("scale", torch.ones_like(norm.weight[:kept], requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(-1, self.dimensions) * self.scale.to(x.dtype))


class WideningLayerNorm(_NarrowLayerNorm):
    """``[..., D']`` -> ``[..., D]``: the last norm of a model with a full-width output."""

    def forward(self, x: Tensor) -> Tensor:
        return widen(super().forward(x), self.dimensions, self.size)


class SkippedLayerNorm(nn.Identity):
    """Replaces the norm after a removed block.

    Attributes:
        eps: of the norm that it replaces; torch's encoder layers read it.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        carry_hooks(norm, self)
        self.train(norm.training)


class Widening(nn.Module):
    """``[..., D']`` -> ``[..., D]``: a :class:`WideningLayerNorm` without the norm."""

    dimensions: Tensor

    def __init__(self, norm: SkippedLayerNorm, kept: int, size: int, device) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("dimensions", _dimensions(kept, device))
        carry_hooks(norm, self)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return widen(x, self.dimensions, self.size)


#: Modules that show that a model's hidden dimensions were pruned.
NARROW = (NarrowTransformerEncoder, SelectingLayerNorm, WideningLayerNorm, Widening)
