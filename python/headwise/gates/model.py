"""Functions that act on all gates of a model."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from headwise.gates.base import Gate
from headwise.gates.distributed import share_if_sharded
from headwise.gates.scope import GateScope, ScopedGate
from headwise.gates.targeted import penalty_of, trained
from headwise.io.checked import check_number
from headwise.io.printable import quoted


def gates(model: nn.Module) -> list[Gate]:
    """The bound gates of a model that choose, in the order of its modules.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {quoted(model)}")
    return [
        m
        for m in model.modules()
        if isinstance(m, Gate) and m.num_heads is not None and not m.wraps
    ]


def _found(model: nn.Module) -> list[Gate]:
    """The gates of a model that is trained; warns if it was not converted."""
    found = gates(model)
    layer = any(isinstance(m, Gate) or hasattr(m, "set_gate") for m in model.modules())
    if not found and not layer:
        warnings.warn(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention and no gate, so "
            f"nothing is trained to choose: call headwise.convert first",
            stacklevel=3,
        )
    return found


def penalty(model: nn.Module) -> Tensor:
    """The gates' regulariser for the last training forward of the model, to be added to the loss.

    Gates whose ``target_scope`` is ``"model"`` are pooled: one penalty on the share of heads that
    they expect to run together, averaged over layers and batch, so that layers and inputs may
    differ. The terms that belong to one layer are averaged over the gates that have them.

    Returns:
        A scalar; 0 if the model has no gate with a penalty, or has not run in training.

    Warns:
        UserWarning: the model has not been converted.
        UserWarning: gradients are on, and the forward ran without them (``torch.no_grad``, or
            ``torch.utils.checkpoint`` with ``use_reentrant=True``), or no parameter of a gate
            requires them (adapters freeze all other parameters): none would reach the gates.
    """
    found = _found(model)
    share_if_sharded(model, found)
    for gate in trained(found):
        if (reason := gate.without_gradient()) is not None:
            warnings.warn(f"the penalty has no gradient, because {reason}", stacklevel=2)
            break
    return penalty_of(found)


def anneal(model: nn.Module, progress: float) -> None:
    """Tells every gate of the model how far training has come, from 0 to 1.

    Raises:
        TypeError: ``progress`` is not a number.
        ValueError: ``progress`` is outside [0, 1].

    Warns:
        UserWarning: the model has not been converted.
    """
    check_number("progress", progress)
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be between 0 and 1, got {progress}")
    found = _found(model)
    share_if_sharded(model, found)
    for gate in found:
        gate.anneal(progress)


def link_gates(model: nn.Module) -> nn.Module:
    """Links the gates of scope ``"model"`` that have equal options: each set decides as one.

    :func:`headwise.convert` and :func:`headwise.load` call it; call it yourself if you put gates
    into layers one by one. Linking again is allowed.

    Returns:
        ``model``.

    Raises:
        ValueError: the options do not fit the number of heads.
    """
    alike: dict[str, list[ScopedGate]] = {}
    for gate in gates(model):
        if isinstance(gate, ScopedGate) and (key := gate.scope_key()) is not None:
            alike.setdefault(key, []).append(gate)
    for members in alike.values():
        scope = GateScope(members)
        for position, gate in enumerate(members):
            gate.join(scope, position)
    return model
