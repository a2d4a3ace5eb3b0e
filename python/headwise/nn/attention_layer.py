"""The interface of layers whose heads can be chosen."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.gates.base import Gate
from headwise.gates.group import GroupGate
from headwise.io.printable import layer_called

if TYPE_CHECKING:
    from headwise._C import LayerPlan

    # Each layer is a module; the mixed-in class is none, so that it comes first.
    _Module = nn.Module
else:
    _Module = object


def of_this_thread() -> Callable[[], bool]:
    """Whether a later call comes from the thread that asks now, or from a backward pass.

    (Recomputation of a checkpointed layer runs in a thread of autograd's on a device.)
    """
    owner = threading.get_ident()
    return lambda: threading.get_ident() == owner or torch._C._current_graph_task_id() != -1


def only_in_this_thread(call: Callable) -> Callable:
    """``call`` for the current thread only: its changes to a model must not affect other threads.

    Raises (when called by another thread):
        RuntimeError: the other thread would get results of a model that is being changed.
    """
    is_own = of_this_thread()

    @functools.wraps(call)
    def guarded(*arguments: Any, **named: Any) -> Any:
        if not is_own():
            raise RuntimeError(
                "another thread analyses this model, which changes it for as long as that lasts: "
                "run a copy of the model (copy.deepcopy) meanwhile"
            )
        return call(*arguments, **named)

    return guarded


class AttentionProbe(NamedTuple):
    """What a recorder set as ``AttentionLayer._probe`` receives in each forward.

    ``context`` is part of the graph that gives the output, before the gate's weight. A layer with
    fewer key/value heads than query heads repeats them, and one with its own scale of scores passes
    queries multiplied so that ``q k^T / sqrt(d)`` are the scores.
    """

    q: Tensor  # [B, H, L, d]
    k: Tensor  # [B, H, S', d]
    v: Tensor  # [B, H, S', d]
    context: Tensor  # [B, H, L, d]
    weight: Tensor | None  # [B, H]
    key_padding_mask: Tensor | None  # [B, S]
    attn_mask: Tensor | None  # [L, S] or broadcastable to [B, H, L, S]
    is_causal: bool
    query_padding_mask: Tensor | None  # [B, L]; None if unknown
    self_attention: bool  # keys are those of the queries' own sequence


class AttentionLayer(_Module, metaclass=abc.ABCMeta):
    """Mixed into the modules that :func:`headwise.attention_layers` finds.

    Such a module calls ``_init_choosing`` at the end of its ``__init__``, asks its ``gate`` in each
    forward, tells every one of ``_observers`` what was chosen (``observer(layer, selection, x,
    padding)``), and passes ``_probe``, if there is one, what every head computed.

    Attributes:
        embed_dim: width of the layer's input, D.
        num_heads: query heads, H: the heads of scores, plans and gates.
        head_dim: width of a head, d.
        gate: None: every head runs for every input.
    """

    #: What :meth:`describe` returns: the type, or types, of each value.
    DESCRIBED: Mapping[str, type | tuple[type, ...]]

    embed_dim: int
    num_heads: int
    head_dim: int
    gate: Gate | None
    _observers: list[Any]
    _probe: Any

    #: How many of the keys the layer adds itself: masks do not cover them.
    _added_keys: int = 0

    def _init_choosing(self, gate: Gate | None) -> None:
        self._observers = []
        self._probe = None
        self.set_gate(gate)

    @property
    @abc.abstractmethod
    def output_projection(self) -> nn.Module:
        """The projection of the heads' outputs ``[.., H d]``; its weight has the layer's device and
        dtype."""

    @property
    def value_bias(self) -> Any:  # Tensor | None
        """``[Hkv d]``: the bias of the values, a view of a parameter; None: they have none."""
        return None

    @property
    def head_groups(self) -> list[int]:
        """For each head the number of its group, ascending: heads of one group share keys and
        values. By default each is alone."""
        return list(range(self.num_heads))

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """The layer's sizes and options for ``headwise.json``, without its gate."""

    @property
    def variant(self) -> str | None:
        """The layer's class if it computes more than :meth:`describe` says, so that only Python can
        run it; otherwise None."""
        return None

    @abc.abstractmethod
    def fitted(self, described: Mapping[str, Any], name: str = "") -> AttentionLayer:
        """A layer without a gate with the sizes of another layer's :meth:`describe`; the layer
        itself if it has them. ``name`` is for the error.

        Raises:
            ValueError: they differ in something that pruning does not change.
        """

    def _check_same(self, described: Mapping[str, Any], keys: Sequence[str], name: str) -> None:
        own = self.describe()
        for key in keys:
            if own[key] != described[key]:
                raise ValueError(
                    f"{key} of {layer_called(name)} is {own[key]} in model and {described[key]} "
                    "in the file"
                )

    @abc.abstractmethod
    def pruned(self, entry: LayerPlan) -> AttentionLayer:
        """An ungated layer with only the heads that ``entry`` keeps, scaled as it says."""

    def bound(self, gate: Gate) -> Gate:
        """A new gate of the configuration of ``gate``, for a layer of these sizes."""
        parameter = self.output_projection.weight
        if not isinstance(parameter, Tensor):  # a method of quantized layers
            raise TypeError(
                f"gate must be set before the layer is quantized: its output projection is a "
                f"{type(self.output_projection).__name__}"
            )
        like = {"device": parameter.device, "dtype": parameter.dtype}
        if isinstance(gate, GroupGate):
            return gate.bind_groups(self.embed_dim, self.head_groups, **like)
        return gate.bind(self.embed_dim, self.num_heads, **like)

    def set_gate(self, gate: Gate | None) -> None:
        """Sets the layer's gate (and binds it if it is unbound), or removes it."""
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate must be a headwise.Gate or None, got {type(gate).__name__}")
        if gate is not None and gate.num_heads is None:
            gate = self.bound(gate)
        if gate is not None and (gate.embed_dim, gate.num_heads) != (
            self.embed_dim,
            self.num_heads,
        ):
            raise ValueError(
                f"gate must be bound to embed_dim={self.embed_dim} and num_heads={self.num_heads}, "
                f"got embed_dim={gate.embed_dim} and num_heads={gate.num_heads}"
            )
        if isinstance(gate, GroupGate) and gate.groups != self.head_groups:
            pairs = zip(self.head_groups, gate.groups, strict=True)
            head, own, other = next((h, a, b) for h, (a, b) in enumerate(pairs) if a != b)
            raise ValueError(
                f"gate must have the layer's groups: head {head} is of group {own}, got {other}"
            )
        if gate is not None and gate.projects:
            gate.fit_layer(self)
        self.gate = gate

    def __getstate__(self) -> dict[str, Any]:
        # Recorders belong to whoever set them, not to a copy or a file.
        return {**self.__dict__, "_observers": [], "_probe": None}
