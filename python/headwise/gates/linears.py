"""Linear layers that operators read the weights of, without ever calling the layer."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

#: What gates hold. Quantization by module type (``quantize_dynamic(model, {nn.Linear})``) leaves
#: it alone, as it leaves the output projection of ``torch.nn.MultiheadAttention``.
ReadLinear = NonDynamicallyQuantizableLinear


def check_read(name: str, linear: nn.Module) -> None:
    """Refuses a layer that computes more than its weight says, as an adapter around it does.

    Raises:
        TypeError: the layer has a forward other than that of ``torch.nn.Linear``.
    """
    kind = type(linear)
    if kind.forward is not nn.Linear.forward:
        raise TypeError(
            f"{name} must be a torch.nn.Linear, whose weight is read without calling it, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
