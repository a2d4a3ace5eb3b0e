"""Observing, overriding and probing a model's attention layers while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.selection import Selection, select_all
from headwise.io.printable import layer_called
from headwise.nn.attention_layer import (
    AttentionLayer,
    AttentionProbe,
    of_this_thread,
    only_in_this_thread,
)
from headwise.nn.layers import attention_layers

__all__ = ["Instrumented", "evaluating", "instrument"]

#: ``(name, layer, selection, x [B, L, D], padding [B, L] or None)``.
Observer = Callable[[str, AttentionLayer, Selection, Tensor, "Tensor | None"], None]
#: ``(name, x [B, L, D], choose) -> Selection``; ``choose()`` is what the layer would select.
Override = Callable[[str, Tensor, Callable[[], Selection]], Selection]
#: ``(name, layer, probe)``.
Probe = Callable[[str, AttentionLayer, AttentionProbe], None]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode; afterwards its modules' modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def replaced(layers: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """The attribute ``name`` of ``layers`` is ``value`` inside the block."""
    before = [(layer, getattr(layer, name)) for layer in layers]
    try:
        for layer, _ in before:
            setattr(layer, name, value)
        yield
    finally:
        for layer, own in before:
            setattr(layer, name, own)


@contextlib.contextmanager
def without_gates(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` with all heads; afterwards its layers have their gates again."""
    gates = [(layer, layer.gate) for layer in attention_layers(model).values()]
    try:
        for layer, _ in gates:
            layer.gate = None
        yield model
    finally:
        for layer, gate in gates:
            layer.gate = gate


class Instrumented:
    """The attention layers of a model inside :func:`instrument`.

    Attributes:
        model: the model.
        layers: its attention layers by name, in the order of :func:`headwise.attention_layers`.
    """

    def __init__(self, model: nn.Module, undo: contextlib.ExitStack) -> None:
        self.model = model
        self.layers = attention_layers(model)
        self._undo = undo

    def observe(self, fn: Observer) -> None:
        """Calls ``fn(name, layer, selection, x, padding)`` whenever a gate, or an override, chose.

        ``x`` ``[B, L, D]`` is the gate's input, ``padding`` ``[B, L]`` marks its padding tokens
        (None: unknown). Layers without a gate choose nothing. Observing does not slow down the
        chosen heads. Calls by other threads are not observed.
        """
        is_own = of_this_thread()
        self._check_sequences()
        for name, layer in self.layers.items():

            @torch._dynamo.disable  # checks the thread, which a graph cannot
            def told(layer, selection, x, padding, name=name) -> None:
                if is_own():
                    fn(name, layer, selection, x, padding)

            layer._observers.append(told)
            self._undo.callback(_remove, layer._observers, told)

    def override(self, fn: Override) -> None:
        """Lets ``fn(name, x, choose)`` select the heads of every call of every layer.

        ``choose()`` returns what the layer would select itself: by its gate, or all heads if it has
        none. Without that call the gate is not run. Heads attend as with the layer's own gate. Of
        several overrides, the last one is asked first.

        Raises:
            ValueError: a layer has a bank of plans, each with its own projection.
            RuntimeError: (when called) another thread runs the model meanwhile.
        """
        fn = only_in_this_thread(fn)
        self._check_sequences()
        for name, layer in self.layers.items():
            if layer.gate is not None and layer.gate.projects:
                raise ValueError(
                    f"{layer_called(name)} has a {type(layer.gate).__name__}, whose projections "
                    "belong to its own choice: no other heads can be selected"
                )
        for name, layer in self.layers.items():
            own = layer.gate
            place: Any = layer  # its gate is not a Gate meanwhile
            place.gate = _Overridden(name, fn, own, layer.num_heads)
            self._undo.callback(setattr, layer, "gate", own)

    def probe(self, fn: Probe) -> None:
        """Calls ``fn(name, layer, probe)`` in every call of every layer, with what all its heads
        compute: see :class:`headwise.nn.AttentionProbe`.

        Every head is computed, by plain operators; the weights of a selection still multiply them.

        Raises:
            RuntimeError: (when called) another thread runs the model meanwhile.
        """
        fn = only_in_this_thread(fn)
        self._check_sequences()
        for name, layer in self.layers.items():
            before = layer._probe

            def told(layer, probe, name=name, before=before) -> None:
                if before is not None:
                    before(layer, probe)
                fn(name, layer, probe)

            layer._probe = told
            self._undo.callback(setattr, layer, "_probe", before)

    def _check_sequences(self) -> None:
        """Raises ValueError if a layer's tokens choose heads: all of this is by the sequence."""
        for name, layer in self.layers.items():
            if layer.gate is not None and layer.gate.routes_tokens:
                raise ValueError(
                    f"{layer_called(name)} has a {type(layer.gate).__name__} that chooses for "
                    "every token, and one choice for every sequence is needed here: give it "
                    f"routing='sequence', or call the gate itself"
                )


@contextlib.contextmanager
def instrument(model: nn.Module, *, evaluate: bool = True) -> Iterator[Instrumented]:
    """Opens a model to observe, override and probe its attention layers inside a ``with`` block.

    ::

        with hw.nn.instrument(model) as opened:
            opened.override(lambda name, x, choose: hw.gates.select_all(len(x), 12))
            opened.observe(lambda name, layer, selection, x, padding: print(selection.count))
            model(**batch)

    Afterwards the model is restored, whatever happened. Blocks may be nested.

    Args:
        model: a converted model.
        evaluate: put it in evaluation mode meanwhile.

    Raises:
        TypeError: ``model`` is not a module.
    """
    with contextlib.ExitStack() as undo:
        opened = Instrumented(model, undo)
        if evaluate:
            undo.enter_context(evaluating(model))
        yield opened


def _remove(observers: list, told: Callable) -> None:
    observers[:] = [o for o in observers if o is not told]


class _Overridden(nn.Module):
    """Replaces a layer's gate, and delegates to it what it does not decide."""

    def __init__(self, name: str, fn: Override, gate: nn.Module | None, num_heads: int) -> None:
        super().__init__()
        self._name, self._fn, self._num_heads = name, fn, num_heads
        self._gate = (gate,)  # no submodule: it is the layer's
        self.train(gate is not None and gate.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_gate" or self._gate[0] is None:
                raise
            return getattr(self._gate[0], name)

    projects = False
    routes_tokens = False

    @property
    def attends(self) -> bool:
        return self._gate[0] is not None and self._gate[0].attends

    @property
    def reads_heads(self) -> bool:
        return self._gate[0] is not None and self._gate[0].reads_heads

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *heads: Any) -> Selection:
        def choose() -> Selection:
            gate = self._gate[0]
            if gate is None:
                return select_all(x.size(0), self._num_heads, device=x.device, dtype=x.dtype)
            return gate(x, key_padding_mask, *heads)

        return self._fn(self._name, x, choose)


def scaled_heads(opened: Instrumented) -> dict[str, Tensor]:
    """A factor for every head's output, while ``opened`` is active.

    Returns layer name -> float ``[H]``, ones at first, to be written in place or replaced by other
    tensors ``[H]``, differentiable ones too. A head with factor 0 does not run. If a layer has a
    gate, the factors multiply the weights that it gives: a head that it did not choose stays off.
    """
    scales = {
        name: torch.ones(layer.num_heads, device=layer.output_projection.weight.device)
        for name, layer in opened.layers.items()
    }

    def scale(name: str, x: Tensor, choose: Callable[[], Selection]) -> Selection:
        selection, factor = choose(), scales[name]  # [H]
        weight = selection.weight * factor.to(selection.weight.dtype)  # [B, H]
        if factor.requires_grad:  # the gradient of a factor at 0 needs the head to run
            return selection._replace(weight=weight)
        index, count = torch.ops.headwise.select_nonzero(weight)
        return selection._replace(index=index, count=count, weight=weight)

    opened.override(scale)
    return scales
