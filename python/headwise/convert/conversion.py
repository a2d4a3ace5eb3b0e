"""``headwise.convert``: a model's attention, swapped in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from headwise.convert.discovery import find_attention, refusals_text
from headwise.convert.versions import check_transformers
from headwise.gates.base import Gate
from headwise.gates.model import link_gates
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers, replace_module

GateFactory = Callable[[str, AttentionLayer], Gate | None]


def convert(
    model: nn.Module,
    gate: Gate | GateFactory | None = None,
    *,
    strict: bool = True,
    keep_selection: bool | None = None,
) -> nn.Module:
    """Swaps the attention of ``model`` in place for layers that choose their heads.

    Weights are kept: with ``gate=None`` the converted model computes what it computed before.
    Hooks on a swapped module and modules that are tied stay as they were. Build the optimizer after
    converting: some architectures keep query, key and value as one parameter.

    Args:
        model: any module with ``torch.nn.MultiheadAttention`` in it (alone or inside
            ``torch.nn.TransformerEncoder``, ``TransformerDecoder``, ``Transformer``), or an
            encoder or decoder of transformers that ``docs/convert.md`` lists. Layers that are
            already converted keep their weights and, where ``gate`` is None, their gate.
        gate: a prototype, of which every layer gets its own copy
            (``convert(model, hw.BudgetGate(target=0.5))``); or a function of the layer's name and
            the layer, which returns the layer's gate or None; or None: no gates.
        strict: refuse a model of which only a part can be converted. With False, that part is
            converted.
        keep_selection: for the layers of decoders
            (:class:`headwise.GroupedQueryAttention`): True: generation chooses once, by the prompt,
            and keeps that choice; False: at every step; None: as the layers say (at first False).

    Returns:
        ``model``, or its successor if it is itself a ``torch.nn.MultiheadAttention``.

    Raises:
        TypeError: ``model`` is not a module, or ``gate`` is neither a gate nor a function.
        ValueError: there is no attention in ``model`` that can be converted, or (``strict``) some
            that cannot; the text lists each and why. ``model`` is then unchanged. Or
            ``keep_selection`` is given and ``model`` is no decoder.
        RuntimeError: ``model`` is of a version of transformers before 5.0.

    A version of transformers newer than those that headwise was tested with gives one warning.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if gate is not None and not isinstance(gate, Gate) and not callable(gate):
        raise TypeError(
            f"gate must be a headwise.Gate, a function (name, layer) -> gate, or None, "
            f"got {type(gate).__name__}"
        )
    check_transformers(model)
    found = find_attention(model)
    if found.refused and (strict or not (found.supported or found.converted)):
        raise ValueError(refusals_text(model, found))
    if not found.supported and not found.converted:
        raise ValueError(
            f"model has no attention module that headwise can convert: "
            f"{type(model).__name__} has neither torch.nn.MultiheadAttention nor any module that "
            f"looks like attention"
        )

    by_architecture: dict[int, tuple] = {}
    for candidate in found.supported:
        successor, _ = candidate.architecture.convert(candidate.module)
        if successor is not candidate.module:
            model = replace_module(model, candidate.module, successor)
        _, modules = by_architecture.setdefault(
            id(candidate.architecture), (candidate.architecture, [])
        )
        modules.append(candidate.module)
    for architecture, modules in by_architecture.values():
        architecture.finish(model, modules)

    if gate is not None:
        _set_gates(model, gate)
    if keep_selection is not None:
        layers = [
            layer
            for layer in attention_layers(model).values()
            if isinstance(layer, GroupedQueryAttention)
        ]
        if not layers:
            raise ValueError(
                f"keep_selection is for decoders, and model ({type(model).__name__}) has no "
                f"headwise.GroupedQueryAttention"
            )
        for layer in layers:
            layer.keep_selection = keep_selection
    return model


def _set_gates(model: nn.Module, gate: Gate | GateFactory) -> None:
    for name, layer in attention_layers(model).items():
        if isinstance(gate, Gate):
            layer.set_gate(layer.bound(gate))
        else:
            layer.set_gate(gate(name, layer))
        if layer.gate is not None:
            layer.gate.train(layer.training)
    link_gates(model)


def converted(model: nn.Module) -> nn.Module:
    """``model``, or a converted copy where it has no headwise attention yet."""
    return model if attention_layers(model) else convert(copy.deepcopy(model))
