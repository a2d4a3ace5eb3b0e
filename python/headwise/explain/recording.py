"""Observing a model's attention layers while it runs, and holding their selections fixed."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from headwise.convert.conversion import converted
from headwise.gates.base import Gate
from headwise.gates.selection import Selection
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers

#: Receives (layer's name, layer, selection or None, the gate's input x [B, L, D] or None, probe).
Receiver = Callable[[str, AttentionLayer, Selection | None, Tensor | None, AttentionProbe], None]


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the parameters and buffers; converted if ``model`` is
    not.

    Explaining attaches recorders and gates with fixed selections, and switches to evaluation mode.
    This is done on a copy, so that other threads that run the model are not affected. A model that
    cannot be copied is returned itself.
    """
    if not attention_layers(model):
        return converted(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # a module may hold anything: a lock, a socket, a generator
        return model


@contextlib.contextmanager
def recording(model: nn.Module, receive: Receiver) -> Iterator[None]:
    """Calls ``receive`` in every call of every attention layer, in the order of the calls.

    Every head is computed (the gates' weights still multiply them), to see what an inactive head
    would look at.
    """
    chosen: dict[str, tuple[Selection, Tensor]] = {}

    def observe(name: str, layer, selection: Selection, x: Tensor, padding) -> None:
        chosen[name] = (selection, x)

    def probe(name: str, layer: AttentionLayer, seen: AttentionProbe) -> None:
        selection, x = chosen.pop(name, (None, None))
        receive(name, layer, selection, x, seen)

    with instrument(model, evaluate=False) as opened:
        opened.observe(observe)
        opened.probe(probe)
        yield


class _Held:
    """Fixed weights of one layer's heads, call by call: 0 = does not run."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # [N, H] for each call in a forward
        self.next = 0

    def selection(self, x: Tensor) -> Selection:
        if self.next >= len(self.weights):
            raise ValueError(
                "model must call its layers equally often in every forward: a layer was called "
                f"more than {len(self.weights)} times"
            )
        weight = self.weights[self.next].to(device=x.device, dtype=x.dtype)  # [N, H]
        self.next += 1
        if weight.size(0) != x.size(0):
            raise ValueError(
                f"model must run the {weight.size(0)} inputs that it was given, got {x.size(0)}"
            )
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)


#: Takes the weights ``[N, H]`` of the calls of the next forward, in their order.
Hold = Callable[[Sequence[Tensor]], None]


@contextlib.contextmanager
def holding(model: nn.Module, calls: Sequence[str]) -> Iterator[Hold]:
    """Every layer runs the heads that the yielded function was given, and no gate runs.

    ``calls``: the layer of each call in a forward.
    """
    with instrument(model, evaluate=False) as opened:
        held = {name: _Held() for name in opened.layers}
        opened.override(lambda name, x, choose: held[name].selection(x))

        def hold(weights: Sequence[Tensor]) -> None:
            for layer in held.values():
                layer.weights, layer.next = [], 0
            for name, weight in zip(calls, weights, strict=True):
                held[name].weights.append(weight)

        yield hold


def gate_description(gate: Gate | None) -> tuple[str, dict[str, Tensor]]:
    """A gate's configuration as JSON text ("" without a gate), and its tensors by name."""
    if gate is None:
        return "", {}
    tensors = {name: p.detach() for name, p in gate.named_parameters()}
    tensors.update((name, b) for name, b in gate.named_buffers() if b is not None)
    return json.dumps(gate.config()), tensors
