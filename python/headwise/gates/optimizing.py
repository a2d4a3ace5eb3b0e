"""Parameter groups for an optimizer: gates have their own learning rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from headwise.gates.base import Gate
from headwise.io.checked import check_number


def choosing_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that decide which heads run: those of its gates, but not the
    output projections that a bank holds for its plans, which are weights like the model's own."""
    return [
        parameter
        for gate in model.modules()
        if isinstance(gate, Gate) and not gate.projects
        for parameter in gate.parameters()
    ]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    gate_lr: float = 5e-2,
    gate_matrix_lr: float = 1e-2,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` in groups for an optimizer.

    ::

        optimizer = torch.optim.AdamW(hw.parameter_groups(model, lr=5e-5))

    At a learning rate for a pretrained model gates hardly move: their vectors have to go from
    undecided to decided within one training. Nothing pulls them towards zero, which would be a
    choice.

    Args:
        model: with gates or without.
        lr: of the model's weights.
        gate_lr: of the gates' vectors (a gate's preference for a head, independent of the input).
        gate_matrix_lr: of the gates' matrices (which read the input). It suits thousands of steps;
            use more for hundreds.
        weight_decay: of the model's matrices; biases, norms and gates have none.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, each parameter in one of them; none is
        empty.

    Raises:
        TypeError: ``model`` is not a module, or a rate is not a number.
        ValueError: a rate or ``weight_decay`` is negative or NaN, or nothing in ``model`` is
            trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rates = {"lr": lr, "gate_lr": gate_lr, "gate_matrix_lr": gate_matrix_lr}
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        check_number(name, value)
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, got {value}")
    own = {id(p) for p in choosing_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model must have a parameter with requires_grad, and it has none")
    groups = [
        {
            "params": [p for p in trained if (id(p) in own, p.dim() > 1) == (of_gate, matrix)],
            "lr": rate,
            "weight_decay": decay,
        }
        for of_gate, matrix, rate, decay in (
            (False, True, lr, weight_decay),
            (False, False, lr, 0.0),
            (True, False, gate_lr, 0.0),
            (True, True, gate_matrix_lr, 0.0),
        )
    ]
    return [group for group in groups if group["params"]]
