"""The same heads for every input: a static plan as a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.selection import Selection


class FixedGate(Gate):
    """Runs the same heads for every input: the masked form of a static plan.

    Args:
        heads: the heads that run, with weight one; default: all of them.
        scale: instead of ``heads``: a weight for each of the H heads; 0 = does not run.
        execution: see :class:`Gate`. ``"selected"`` by default: a dropped head has weight 0 for
            good, so no gradient reaches it either way.
        embed_dim: width of the layer's input.
        num_heads: heads of the layer, H.
        device: of the buffer ``scale`` ``[H]``.
        dtype: of the buffer ``scale``.

    Raises:
        ValueError: both ``heads`` and ``scale``, a head outside ``0..H-1`` or named twice, or a
            ``scale`` of another length than H or with a value that is not finite.
    """

    scale: Tensor

    def __init__(
        self,
        heads: Sequence[int] | None = None,
        *,
        scale: Sequence[float] | Tensor | None = None,
        execution: str = "selected",
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        if heads is not None and scale is not None:
            raise ValueError("heads and scale must not both be given")
        options = {
            "heads": None if heads is None else [int(head) for head in heads],
            "scale": None if scale is None else [float(value) for value in scale],
        }
        super().__init__(
            options,
            execution=execution,
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        )

    def _build(self, device, dtype) -> None:
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
            for value in scale:
                if value - value != 0.0:
                    raise ValueError(f"scale must be finite, got {value}")
            return scale
        if heads is None:
            return [1.0] * num_heads
        initial = [0.0] * num_heads
        for head in heads:
            if not 0 <= head < num_heads:
                raise ValueError(f"heads must be in 0..{num_heads - 1}, got {head}")
            if initial[head] != 0.0:
                raise ValueError(f"heads must not name a head twice, got {head} again")
            initial[head] = 1.0
        return initial

    def config(self):
        """The configuration; of a bound gate with the ``scale`` it now has."""
        config = super().config()
        if self.num_heads is not None:
            config.update(heads=None, scale=self.scale.double().tolist())
        return config

    def bind(self, embed_dim: int, num_heads: int, device=None, dtype=None) -> FixedGate:
        return type(self)(
            self._options["heads"],
            scale=self._options["scale"],
            execution=self.execution,
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        ).train(self.training)

    def static_weight(self) -> Tensor:
        return self.scale

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        weight = self.scale.to(x.dtype).expand(x.size(0), -1)  # [B, H]
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)
