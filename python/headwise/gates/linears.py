"""Linear layers whose weights operators read without calling the layer."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

#: The layers of gates. Quantization by module type (``quantize_dynamic(model, {nn.Linear})``)
#: does not touch it, nor the output projection of ``torch.nn.MultiheadAttention``.
ReadLinear = NonDynamicallyQuantizableLinear


def check_read(name: str, linear: nn.Module) -> None:
    """Raises an error for a layer that computes more than its weight, such as one with an adapter.

    Raises:
        TypeError: the layer has a forward other than that of ``torch.nn.Linear``, or a weight
            computed from other parameters.
    """
    kind = type(linear)
    if "weight" not in linear._parameters and kind.forward is nn.Linear.forward:
        raise TypeError(
            f"{name} must have its weight as a parameter, and it is computed from others "
            f"(weight_norm, torch.nn.utils.prune or a parametrization: make it permanent first)"
        )
    if kind.forward is not nn.Linear.forward:
        raise TypeError(
            f"{name} must be a torch.nn.Linear, whose weight is read without calling it, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
