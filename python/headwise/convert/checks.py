"""Why a module of attention cannot be converted: its contents, hooks and wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from headwise.convert.registry import class_path, overridden
from headwise.nn.decoder_inputs import forward_replaced

#: Kinds of hooks on a module, by the attribute that holds them.
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}

#: Those that affect what is computed.
CALLED = tuple(HOOKS)[:4]


def replaced_text(name: str, part: nn.Module) -> str:
    """The refusal of attention whose projection is not a plain linear layer."""
    return (
        f"its {name} was replaced by a {class_path(type(part))} (merge or remove what is "
        f"around the linear layer)"
    )


def class_fault(name: str, part: nn.Module, expected: type) -> str | None:
    """Why a part of attention may compute something else than its class."""
    kind = type(part)
    if not issubclass(kind, expected):
        return f"its {name} is a {kind.__name__}, not a {expected.__name__}"
    method = overridden(kind, expected)
    if method is not None:
        return f"its {name} is a {kind.__name__} with its own {method}"
    return None


def projection_fault(name: str, linear: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why a projection cannot be converted: it does more than multiply by its weight."""
    if type(linear) is not kind:
        return replaced_text(name, linear)
    return forward_fault(name, linear) or parameters_fault(name, linear, ("weight", "bias"))


def forward_fault(name: str, module: nn.Module) -> str | None:
    """Why a module that computes something else than its class cannot be replaced."""
    if forward_replaced(module):
        where = f" of its {name}" if name else ""
        return f"the forward{where} was replaced on the instance (convert first, then wrap it)"
    return None


def parameters_fault(name: str, module: nn.Module, expected: Iterable[str]) -> str | None:
    """Why parameters cannot be read: they are computed, or there are additional ones."""
    expected = set(expected)
    own = {key for key, value in module._parameters.items() if value is not None}
    where = f" of its {name}" if name else ""
    for key in sorted(expected):
        held = key in module._parameters or key in module._buffers
        if not held and getattr(module, key, None) is not None:
            return (
                f"the {key}{where} is computed from other parameters (weight_norm, spectral_norm, "
                f"torch.nn.utils.prune or a parametrization: make it permanent and remove it)"
            )
    more = sorted((own | set(module._buffers)) - expected)
    if more:
        return f"it holds '{more[0]}'{where}, which its class does not have"
    return None


def hooks_fault(
    name: str, module: nn.Module, kinds: Iterable[str] = HOOKS, why: str = "would not be called"
) -> str | None:
    """Why a module's hooks cannot be carried over."""
    for attribute in kinds:
        for hook in getattr(module, attribute).values():
            if not _is_of_transformers(hook):
                what = getattr(hook, "__qualname__", type(hook).__name__)
                return (
                    f"its {name} has a {HOOKS[attribute]} ({_short(what)}) that {why} after a "
                    f"conversion: remove it, convert, and register another"
                )
    return None


def renamed_fault(module: nn.Module) -> str | None:
    """Why hooks that see the names of attention's parameters cannot be carried over."""
    return hooks_fault("attention", module, tuple(HOOKS)[len(CALLED) :], "would see other names")


def copied_fault(name: str, parameter: nn.Parameter) -> str | None:
    """Why a parameter cannot be copied into another one."""
    if type(parameter) is not nn.Parameter:
        return f"its {name} is a {class_path(type(parameter))}, not a plain parameter"
    hooks = (
        getattr(parameter, "_backward_hooks", None),
        getattr(parameter, "_post_accumulate_grad_hooks", None),
    )
    if any(hooks):
        return (
            f"its {name} has a hook on its gradient, which would be lost: it becomes part of "
            f"another parameter"
        )
    return None


def children_fault(
    name: str, module: nn.Module, expected: Iterable[str], parameters: Iterable[str] = ()
) -> str | None:
    """Why a module that holds more than its class cannot be replaced."""
    where = f" in its {name}" if name else ""
    more = [key for key, child in module._modules.items() if child is not None]
    more = [key for key in more if key not in set(expected)]
    if more:
        return f"it holds '{more[0]}'{where}, which its class does not have"
    return parameters_fault(name, module, parameters)


# The last two are those of converted models.
_PLAIN = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_PLAIN |= {"headwise", "headwise_causal"}


def implementation_fault(config: Any) -> str | None:
    """The refusal of a model with a custom attention implementation."""
    name = getattr(config, "_attn_implementation", None)
    if name is None or name in _PLAIN:
        return None
    return (
        f"its implementation {str(name)[:60]!r} is none that is known to be plain attention "
        f"(model.set_attn_implementation('sdpa') chooses one that is)"
    )


def first(faults: Iterable[str | None]) -> str | None:
    """The first that is one."""
    return next((fault for fault in faults if fault is not None), None)


def _is_of_transformers(hook: Callable) -> bool:
    # It collects attention weights and hidden states, whose places did not change.
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
