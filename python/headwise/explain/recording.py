"""Looking into a model's attention layers while it runs, and holding their selections."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from headwise.gates.base import Gate
from headwise.gates.selection import Selection
from headwise.gates.threshold import HeadInputs
from headwise.nn.layers import attention_layers
from headwise.nn.multihead_attention import AttentionProbe, MultiheadAttention

#: Receives (layer's name, layer, selection or None, the gate's input x [B, L, D] or None, probe).
Receiver = Callable[
    [str, MultiheadAttention, Selection | None, Tensor | None, AttentionProbe], None
]


class _Recorder:
    """Observer and probe of one layer: the first tells of the selection, the second of the rest."""

    def __init__(self, name: str, receive: Receiver):
        self.name = name
        self.receive = receive
        self._chosen: tuple[Selection, Tensor] | None = None

    def observe(self, layer: MultiheadAttention, selection: Selection, x: Tensor, padding) -> None:
        self._chosen = (selection, x)

    def __call__(self, layer: MultiheadAttention, probe: AttentionProbe) -> None:
        selection, x = self._chosen or (None, None)
        self._chosen = None
        self.receive(self.name, layer, selection, x, probe)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def recording(model: nn.Module, receive: Receiver) -> Iterator[None]:
    """Calls ``receive`` in every call of every attention layer, in the order of the calls.

    Every head is computed then (the gates' weights still multiply them), so that what a sleeping
    head would look at can be told.
    """
    layers = attention_layers(model)
    probes = {name: layer._probe for name, layer in layers.items()}
    recorders = {name: _Recorder(name, receive) for name in layers}
    try:
        for name, layer in layers.items():
            layer._probe = recorders[name]
            layer._observers.append(recorders[name].observe)
        yield
    finally:
        for name, layer in layers.items():
            layer._probe = probes[name]
            kept = [o for o in layer._observers if o != recorders[name].observe]
            layer._observers[:] = kept


class HeldGate(nn.Module):
    """Gives a layer, call by call, weights that were decided beforehand: 0 = does not run.

    The heads attend as with the gate that it takes the place of.
    """

    def __init__(self, gate: Gate | None) -> None:
        super().__init__()
        self.weights: list[Tensor] = []  # [N, H] for each call in a forward
        self._next = 0
        self._gate = (gate,)  # no submodule: it is the layer's

    # What a layer asks a gate: whether it also attends, whether it is given queries and keys.
    @property
    def attends(self) -> bool:
        return self._gate[0] is not None and self._gate[0].attends

    @property
    def reads_heads(self) -> bool:
        return self.attends

    def attend(self, heads: HeadInputs, v: Tensor) -> Tensor:
        """``v [N, H, S', d]`` -> ``[N, H, L, d]``"""
        return self._gate[0].attend(heads, v)

    def hold(self, weights: Sequence[Tensor]) -> None:
        """The weights of the calls of the next forward, in their order."""
        self.weights, self._next = list(weights), 0

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        heads: HeadInputs | None = None,
    ) -> Selection:
        if self._next >= len(self.weights):
            raise ValueError(
                "model must call its layers as often in every forward: a layer was called more "
                f"than {len(self.weights)} times"
            )
        weight = self.weights[self._next].to(device=x.device, dtype=x.dtype)  # [N, H]
        self._next += 1
        if weight.size(0) != x.size(0):
            raise ValueError(
                f"model must run the {weight.size(0)} inputs that it was given, got {x.size(0)}"
            )
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)


@contextlib.contextmanager
def holding(model: nn.Module) -> Iterator[dict[str, HeldGate]]:
    """Every layer's gate replaced by a :class:`HeldGate`; afterwards the gates are back."""
    layers = attention_layers(model)
    gates = {name: layer.gate for name, layer in layers.items()}
    held = {name: HeldGate(gates[name]) for name in layers}
    try:
        for name, layer in layers.items():
            layer.gate = held[name]
        yield held
    finally:
        for name, layer in layers.items():
            layer.gate = gates[name]


def gate_description(gate: Gate | None) -> tuple[str, dict[str, Tensor]]:
    """A gate's configuration as JSON text ("" without a gate), and its tensors by name."""
    if gate is None:
        return "", {}
    tensors = {name: p.detach() for name, p in gate.named_parameters()}
    tensors.update((name, b) for name, b in gate.named_buffers() if b is not None)
    return json.dumps(gate.config()), tensors
