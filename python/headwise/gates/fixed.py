"""The same heads for every input: a static plan as a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.selection import Selection


class FixedGate(Gate):
    """Runs the same heads for every input: the masked form of a static plan.

    {options}

    Raises:
        TypeError: ``heads`` or ``scale`` is not a sequence, or holds something other than numbers.
        ValueError: both ``heads`` and ``scale``, a head that is not a whole number, is outside
            ``0..H-1`` or named twice, or a ``scale`` of another length than H or with a value that
            is not finite.
    """

    scale: Tensor

    def _build(self, device, dtype) -> None:
        self.__dict__.pop("scale", None)  # the option, which the buffer replaces
        self.register_buffer("scale", torch.empty(self.num_heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        if self.num_heads is not None:
            values = torch.tensor(self._initial_scale(self.num_heads), dtype=torch.float64)
            self.scale.copy_(values)

    def _initial_scale(self, num_heads: int) -> list[float]:
        heads, scale = self._options["heads"], self._options["scale"]
        if scale is not None:
            if len(scale) != num_heads:
                raise ValueError(f"scale must have {num_heads} values, got {len(scale)}")
            return scale
        if heads is None:
            return [1.0] * num_heads
        initial = [0.0] * num_heads
        for head in heads:
            if head >= num_heads:
                raise ValueError(f"heads must be in 0..{num_heads - 1}, got {head}")
            initial[head] = 1.0
        return initial

    def config(self):
        """The configuration; for a bound gate with its current ``scale``."""
        config = super().config()
        if self.num_heads is not None:
            config.update(heads=None, scale=self.scale.double().tolist())
        return config

    def bind(self, embed_dim: int, num_heads: int, device=None, dtype=None) -> FixedGate:
        bound = type(self)(
            **self._options, embed_dim=embed_dim, num_heads=num_heads, device=device, dtype=dtype
        )
        return bound.train(self.training)

    def static_weight(self) -> Tensor:
        return self.scale

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        weight = self.scale.to(x.dtype).expand(x.size(0), -1)  # [B, H]
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)
