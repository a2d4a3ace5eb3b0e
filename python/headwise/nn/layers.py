"""Finding the attention layers of a model, by the names that scores, plans and traces use."""

from __future__ import annotations

from collections.abc import MutableMapping
from types import MethodType

from torch import nn

from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.decoder_inputs import forward_replaced

__all__ = ["attention_layers", "head_groups"]


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The layers of ``model`` whose heads can be chosen, by qualified module name:
    :class:`headwise.MultiheadAttention` and :class:`headwise.GroupedQueryAttention`.

    The order is that in which the modules were defined, which for the supported architectures is
    the order in which they run. A layer that occurs twice in a model (tied) is listed once, under
    its first name. The name of a model that is itself a layer is ``""``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AttentionLayer)
    }


def head_groups(model: nn.Module) -> dict[str, list[int]]:
    """For each layer of :func:`attention_layers`, the group number of each of its heads.

    The query heads of a group share a key/value head (:class:`headwise.GroupedQueryAttention`); in
    other layers each head is a group.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return {name: list(layer.head_groups) for name, layer in attention_layers(model).items()}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replaces ``old`` by ``new`` everywhere in ``model``; returns the model, or ``new``.

    Raises:
        ValueError: a module of the model refers to ``old`` elsewhere, and would keep calling it.
    """
    if old is model:
        return new
    check_references(model, (set(old.modules()) - set(new.modules())) | {old})
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


_ITEMS_OF_MODULES = frozenset(vars(nn.Module()))


def check_references(model: nn.Module, gone: set[nn.Module]) -> None:
    """Raises ValueError if a module of ``model`` refers to one that is removed from it."""
    for where, parent in model.named_modules():
        for name, value in () if parent in gone else vars(parent).items():
            if name in _ITEMS_OF_MODULES:
                continue
            held = list(value.values()) if isinstance(value, dict) else value
            for item in held if isinstance(held, list | tuple) else [held]:
                called = item.__self__ if isinstance(item, MethodType) else item
                if isinstance(called, nn.Module) and called in gone:
                    place = f"{where}.{name}" if where else name
                    raise ValueError(
                        f"'{place}' refers to the {type(called).__name__} that is to be replaced, "
                        f"and would go on calling it: remove the reference first (compile modules, "
                        f"as by torch.compile, after converting and pruning)"
                    )


def check_replaceable(module: nn.Module) -> None:
    """Raises ValueError if ``module`` has a forward that whatever replaces it would not run."""
    if forward_replaced(module):
        raise ValueError(
            f"a {type(module).__name__} has another forward than its class (accelerate, for "
            f"example, wraps it): restore it before the module is replaced by a smaller one"
        )


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves the hooks that were registered on ``old`` to ``new``; their handles stay valid.

    Raises:
        ValueError: as :func:`check_replaceable`.
    """
    check_replaceable(old)
    for attribute, hooks in vars(old).items():
        if "hooks" in attribute and isinstance(hooks, MutableMapping):
            hooks.update(vars(new).get(attribute, {}))
            vars(new)[attribute] = hooks
    new._is_full_backward_hook = old._is_full_backward_hook
