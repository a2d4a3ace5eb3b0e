"""Head masks as in version 4 of transformers: a factor per head, and heads to prune by layer."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.io.printable import layer_called, quoted
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.instrumenting import instrument, scaled_heads
from headwise.nn.layers import attention_layers
from headwise.pruning.apply import NOT_CONVERTED, prune
from headwise.pruning.plans import HeadPlan, LayerPlan

__all__ = ["HeadMask", "head_mask", "plan_from_mask", "prune_heads"]

#: Layers by position or by name -> a factor per head.
Factors = Tensor | Mapping[Any, Any]


class HeadMask:
    """A head mask on a model, made by :func:`head_mask`: a context manager that removes it."""

    def __init__(self, layers: Iterable[AttentionLayer], undo: contextlib.ExitStack) -> None:
        self._placed = [(layer, layer.gate) for layer in layers]
        self._undo = undo

    def remove(self) -> None:
        """Removes the mask; a second call does nothing.

        Raises:
            RuntimeError: another mask, or a gate, was put on the model after this one.
        """
        if any(layer.gate is not gate for layer, gate in self._placed):
            raise RuntimeError(
                "head masks come off in the reverse order: another mask, or a gate, was put on the "
                "model after this one"
            )
        self._placed = []
        self._undo.close()

    def __del__(self) -> None:
        # A call as a statement, without `with`, would otherwise silently mask nothing.
        if getattr(self, "_placed", None) and not sys.is_finalizing():
            self.remove()
            warnings.warn(
                "a head mask that nothing held has been removed: write "
                "`with headwise.head_mask(model, mask):`, or keep the result until remove()",
                stacklevel=2,
            )

    def __enter__(self) -> HeadMask:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def head_mask(model: nn.Module, mask: Factors) -> HeadMask:
    """Multiplies the output of every head by a factor, as the argument ``head_mask`` of models of
    transformers 4 did.

    ::

        with hw.head_mask(model, mask):
            output = model(**batch)

    The mask is on the model at once; the end of the ``with`` block, or ``remove()`` of the result,
    removes it. It changes neither modes nor weights. A head whose factor is 0 does not run, unless
    ``mask`` requires a gradient: the gradient with respect to a factor, zeros included, is that of
    Michel et al. 2019 (arXiv 1905.10650, eq. 2). If a layer has a gate, the factors multiply its
    weights. Masks may be nested: their factors multiply.

    To keep a mask, also in files and in other threads: ``hw.mask(model, plan_from_mask(model,
    mask))``.

    Args:
        model: a converted model.
        mask: floats, integers or booleans ``[layers, heads]`` or ``[heads]`` (the same for every
            layer), in the order of :func:`headwise.attention_layers`; or a mapping from layers, by
            position or name, to factors ``[heads]`` (tensors or sequences): other layers run all
            their heads.

    Returns:
        A context manager that removes the mask. Hold it: when it is deleted, the mask is removed,
        with a warning.

    Raises:
        TypeError: ``model`` is not a module, or ``mask`` neither a tensor nor a mapping.
        ValueError: ``model`` has not been converted, a factor is not finite, the mask has another
            shape than the model, or names a layer that does not exist or twice; or a layer has a
            bank of plans, which alone can choose its heads.
        RuntimeError: (when the model runs) another thread runs it while the mask is on.
    """
    factors = _factors(model, mask)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(instrument(model, evaluate=False))
        scales = scaled_heads(opened)
        for name, values in factors.items():
            scales[name] = values.to(scales[name].device)
        return HeadMask(opened.layers.values(), stack.pop_all())


def plan_from_mask(model: nn.Module, mask: Factors) -> HeadPlan:
    """The plan that is equivalent to ``mask``: heads of factor 0 are dropped, the others scaled.

    ``hw.mask(model, plan)`` keeps it on the model as gates, ``hw.prune(model, plan)`` removes the
    heads from the weights.

    Args:
        model: a converted model.
        mask: see :func:`head_mask`. Layers that it does not name are not in the plan.

    Returns:
        A plan of metric ``"mask"``.

    Raises:
        TypeError, ValueError: see :func:`head_mask`.
    """
    entries = []
    for name, values in _factors(model, mask).items():
        scale = values.detach().double().tolist()
        heads = [head for head, value in enumerate(scale) if value != 0.0]
        entries.append(LayerPlan(name, len(scale), heads, [scale[head] for head in heads]))
    return HeadPlan(entries, "mask")


def prune_heads(
    model: nn.Module, heads: Mapping[int | str, Iterable[int]], **options: Any
) -> nn.Module:
    """Removes heads by number, as the method ``prune_heads`` of models of transformers 4 did.

    Heads are numbered as in ``model``: after pruning, the remaining ones are renumbered.

    Args:
        model: a converted model.
        heads: layers, by position (in the order of :func:`headwise.attention_layers`) or by name
            -> the heads to remove. All heads of a layer may be removed: its output is then its
            output bias.
        options: of :func:`headwise.prune`, which does the work: ``repair``, ``inplace``, ...

    Returns:
        The smaller model: a copy, or with ``inplace=True`` ``model`` itself.

    Raises:
        TypeError: ``heads`` is not a mapping from layers to whole numbers.
        ValueError: a layer or head that does not exist, or a layer named twice; and errors of
            :func:`headwise.prune`.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must map layers to heads, got {type(heads).__name__}")

    def kept(name: str, layer: AttentionLayer, removed: Any) -> Tensor:
        factors = torch.ones(layer.num_heads)
        if isinstance(removed, str) or not isinstance(removed, Iterable):
            raise TypeError(f"heads of {layer_called(name)} must be a list, got {quoted(removed)}")
        for head in removed:
            if isinstance(head, bool) or not hasattr(head, "__index__"):
                raise TypeError(
                    f"heads of {layer_called(name)} must be whole numbers, got {quoted(head)}"
                )
            if not 0 <= head < layer.num_heads:
                raise ValueError(
                    f"heads of {layer_called(name)} must be in 0..{layer.num_heads - 1}, got {head}"
                )
            factors[head] = 0.0
        return factors

    return prune(model, plan_from_mask(model, _by_layer(model, heads, kept)), **options)


def _by_layer(
    model: nn.Module,
    given: Mapping[int | str, Any],
    read: Callable[[str, AttentionLayer, Any], Tensor],
) -> dict[str, Tensor]:
    """Layer name -> ``read(name, layer, value)``, of what is given by position or name."""
    layers = attention_layers(model)
    if not layers:
        raise ValueError(NOT_CONVERTED.format(type(model).__name__))
    names = list(layers)
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        name: Any = key
        if isinstance(key, int) and not isinstance(key, bool):
            if not 0 <= key < len(names):
                raise ValueError(f"layer must be in 0..{len(names) - 1}, got {key}")
            name = names[key]
        if name not in layers:
            raise ValueError(
                f"layer must be a position or a name of headwise.attention_layers(model), "
                f"got {quoted(key)}"
            )
        if name in found:
            raise ValueError(
                f"{layer_called(name)} must be named once, by its position or its name"
            )
        found[name] = read(name, layers[name], value)
    return found


def _factors(model: nn.Module, mask: Factors) -> dict[str, Tensor]:
    """Layer name -> float ``[H]``, finite, as views of ``mask``: gradients reach it."""
    if isinstance(mask, Mapping):
        return _by_layer(model, mask, _row)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or a mapping, got {type(mask).__name__}")
    layers = attention_layers(model)
    rows = mask.expand(len(layers), -1) if mask.dim() == 1 else mask
    if rows.dim() != 2 or len(rows) != len(layers):
        raise ValueError(
            f"mask must have shape [layers, heads] ([{len(layers)}, ...]) or [heads], "
            f"got {list(mask.shape)}"
        )
    return _by_layer(model, dict(enumerate(rows)), _row)


def _row(name: str, layer: AttentionLayer, values: Any) -> Tensor:
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"mask of {layer_called(name)} must be a tensor or a list of numbers, got "
            f"{quoted(values)}"
        ) from None
    if values.shape != (layer.num_heads,):
        raise ValueError(
            f"mask of {layer_called(name)} must have shape [{layer.num_heads}], one factor per "
            f"head, got {list(values.shape)}"
        )
    if values.is_complex():
        raise TypeError(f"mask of {layer_called(name)} must hold real numbers, got {values.dtype}")
    if not values.is_floating_point():
        values = values.float()
    if not torch.isfinite(values).all():
        raise ValueError(f"mask of {layer_called(name)} must be finite, got NaN or infinity")
    return values
