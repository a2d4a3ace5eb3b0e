"""``headwise.convert``: replaces a model's attention in place."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from torch import nn

from headwise.convert.adapters import check_adapters
from headwise.convert.discovery import Candidate, Found, find_attention, refusals_text
from headwise.convert.registry import Architecture
from headwise.convert.saving import save_as_the_original
from headwise.convert.versions import check_transformers
from headwise.gates.base import Gate
from headwise.gates.model import link_gates
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.gate_proof import check_gates
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers, check_references, replace_module
from headwise.nn.proof import Proof, kind_of, unchanged_on_error

_log = logging.getLogger("headwise.convert")

GateFactory = Callable[[str, AttentionLayer], Gate | None]


def convert(
    model: nn.Module,
    gate: Gate | GateFactory | None = None,
    *,
    strict: bool = True,
    keep_selection: bool | None = None,
    verify: bool = True,
    adapters: Mapping[type, Architecture] | None = None,
) -> nn.Module:
    """Replaces the attention of ``model`` in place by layers that choose their heads.

    Weights are kept: with ``gate=None`` the converted model computes the same as before, and
    ``verify`` checks it. Hooks on a replaced module and tied modules are kept; what cannot be kept
    (a hook on a projection that is merged with others) raises an error. Create the optimizer after
    converting: some architectures store query, key and value as one parameter. The logger
    ``headwise.convert`` reports what was converted (INFO) and what ``strict=False`` left alone
    (WARNING).

    Args:
        model: any module with ``torch.nn.MultiheadAttention`` in it (alone or inside
            ``torch.nn.TransformerEncoder``, ``TransformerDecoder``, ``Transformer``), or an
            encoder or decoder of transformers that ``docs/convert.md`` lists. Layers that are
            already converted keep their weights and, if ``gate`` is None, their gate.
        gate: a prototype, of which every layer gets its own copy
            (``convert(model, hw.BudgetGate(keep=0.5))``); or a function of the layer's name and
            the layer, which returns the layer's gate or None; or None: no gates.
        strict: raise an error if only a part of the model can be converted. With False, that part
            is converted.
        keep_selection: for the layers of decoders
            (:class:`headwise.GroupedQueryAttention`): True: generation chooses once, by the prompt,
            and keeps that choice; False: at every step; None: unchanged (initially False).
        verify: run the original and the converted attention of each kind (class, sizes, options) on
            a few made-up tokens, in the model's dtype, without a gate: with padding, and with a
            cache if there is one. Then run each kind of gated layer and compare it with all of its
            heads, weighted by the gate. Layers on the meta device cannot be run and are not
            checked.
        adapters: your own classes of attention, each with the description by
            :func:`headwise.convert.qkv` of it.

    Returns:
        ``model``, or its replacement if it is itself a ``torch.nn.MultiheadAttention``.

    Raises:
        TypeError: ``model`` is not a module, ``gate`` is neither a gate nor a function, or
            ``adapters`` is not a mapping from classes to adapters.
        ValueError: there is no attention in ``model`` that can be converted, or (``strict``) some
            that cannot; the text lists each and why. Or a converted layer does not compute the same
            as before (``verify``). Or ``keep_selection`` is given and ``model`` is not a decoder.
        RuntimeError: ``model`` is of a version of transformers before 5.

    After any error, including those of ``gate``, ``model`` is restored. A version of transformers
    newer than the tested ones gives one warning.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(gate, type):
        raise TypeError(f"gate must be a gate or a function, got the class {gate.__name__}")
    if gate is not None and not isinstance(gate, Gate) and not callable(gate):
        raise TypeError(
            f"gate must be a headwise.Gate, a function (name, layer) -> gate, or None, "
            f"got {type(gate).__name__}"
        )
    check_transformers(model)
    found = find_attention(model, check_adapters(adapters))
    if found.refused and (strict or not (found.supported or found.converted)):
        raise ValueError(refusals_text(model, found))
    if not found.supported and not found.converted:
        raise ValueError(
            f"model has no attention module that headwise can convert: "
            f"{type(model).__name__} has neither torch.nn.MultiheadAttention nor any module that "
            f"looks like attention"
        )

    with unchanged_on_error(model):
        verified = _swap(model, found.supported, verify)
        model = verified.model
        if gate is not None:
            _set_gates(model, gate)
        if keep_selection is not None:
            _keep_selections(model, keep_selection)
        save_as_the_original(model)
        if verify:
            check_gates(model)
    _report(found, verified)
    return model


class _Swapped(NamedTuple):
    model: nn.Module
    tried: int  # kinds of attention that were verified
    untried: list[str]  # names of modules that could not be run, and kinds without a trial


def _swap(model: nn.Module, candidates: list[Candidate], verify: bool) -> _Swapped:
    by_architecture: dict[int, tuple[Architecture, list[nn.Module]]] = {}
    kinds: set[Hashable] = set()
    tried, untried = 0, []
    for candidate in candidates:
        module, architecture = candidate.module, candidate.architecture
        proof = None
        if verify and (kind := kind_of(module)) not in kinds:
            kinds.add(kind)
            proof = Proof.of(module, candidate.name, architecture.trial(module))
            tried += proof is not None
            if proof is None:
                untried.append(candidate.name or type(module).__name__)
        parts = set(module.modules())
        replacement, _ = architecture.convert(module)
        if proof is not None:
            proof.check(replacement)
        if replacement is module:  # only parts of it were replaced
            check_references(model, parts - set(module.modules()))
        else:
            model = replace_module(model, module, replacement)
        by_architecture.setdefault(id(architecture), (architecture, []))[1].append(module)
    for architecture, modules in by_architecture.values():
        architecture.finish(model, modules)
    return _Swapped(model, tried, untried)


def _keep_selections(model: nn.Module, keep_selection: bool) -> None:
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


def _report(found: Found, swapped: _Swapped) -> None:
    if found.supported:
        kinds = Counter(type(candidate.module).__name__ for candidate in found.supported)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        _log.info(
            "converted %s; verified %d kind%s%s",
            counted,
            swapped.tried,
            "" if swapped.tried == 1 else "s",
            f"; not verified: {', '.join(swapped.untried)}" if swapped.untried else "",
        )
    reasons = Counter((refused.kind, refused.reason) for refused in found.refused)
    for (kind, reason), count in reasons.items():
        _log.warning("left %d %s alone: %s", count, kind, reason)


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
    """``model``, or a converted copy if it has no headwise attention yet."""
    return model if attention_layers(model) else convert(copy.deepcopy(model))
