"""Gates that decide together: those of scope ``"model"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.recomputation import Replay, recomputing


class GateScope:
    """The gates of one model that decide together, in the model's order; made by
    :func:`link_gates`.

    Each gate keeps its parameters, under its layer's name, and refers to this shared object, which
    is copied and pickled with them. A gate that is removed from the model still counts until
    :func:`link_gates` is called again.

    Attributes:
        gates: the gates.
        num_heads: of all their layers.
    """

    def __init__(self, members: Sequence[Gate]):
        self.gates = list(members)
        self._noise: tuple[Tensor, ...] = ()
        self._drawn: tuple[Tensor, ...] = ()
        self._replays = [Replay() for _ in self.gates]
        self._served: set[int] = set()
        #: What the gate that decides leaves for those after it (BankGate): int64 ``[B]``.
        self.plan: Tensor | None = None
        self._begun = False

    @property
    def num_heads(self) -> int:
        return sum(gate.num_heads for gate in self.gates)

    def start(self, position: int) -> int:
        """Where the heads of the gate at ``position`` begin among the model's."""
        return sum(gate.num_heads for gate in self.gates[:position])

    def begins(self, position: int) -> bool:
        """Whether the gate at ``position`` begins a training forward of the model.

        The gate that asks a second time does, so no gate needs to know which one comes first.
        """
        first = not self._begun or position in self._served
        if first:
            self._served, self._begun = set(), True
        self._served.add(position)
        return first

    def draw(
        self,
        position: int,
        x: Tensor,
        sample: Callable[[], tuple[Tensor, ...]],
        make: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """``make(*sample())``, once for a training forward of the model.

        A forward that is repeated inside a backward (activation checkpointing) gets the same
        values. ``x`` is the input of the gate at ``position``.
        """
        replay = self._replays[position]
        if recomputing() and (again := replay.recall(x)) is not None:
            first, differentiable, noise, drawn = again
            if first:
                sample()  # the generator advances as before
            # The gate that made it must do the same again, operator by operator. Where the forward
            # had no gradients every gate makes it, for its own graph.
            return make(*noise) if first or not differentiable else drawn
        first = self.begins(position)
        if first:
            self._noise = sample()
            self._drawn = make(*self._noise)

        def used() -> tuple:
            # Leaves that require gradients if the drawn tensors do: the graph is not kept.
            leaves = (part.detach().requires_grad_(part.requires_grad) for part in self._drawn)
            return first, torch.is_grad_enabled(), self._noise, tuple(leaves)

        replay.remember(x, used)
        return self._drawn

    def __getstate__(self) -> dict:
        # What was drawn belongs to a graph, and a copy begins with a new forward.
        return {**self.__dict__, "_noise": (), "_drawn": (), "_begun": False, "plan": None}


class ScopedGate(Gate if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed into gates with an option ``scope``: ``"model"`` or ``"layer"``."""

    _scope: GateScope | None = None
    _position = 0

    def scope_key(self) -> str | None:
        """Gates of scope ``"model"`` with equal keys decide together; None: this one alone."""
        return self._config_key() if self.scope == "model" else None

    def join(self, scope: GateScope, position: int) -> None:
        """Takes its place among the gates of ``scope``, all of which are already in it."""
        self._scope = scope
        self._position = position

    def _joined(self) -> GateScope:
        """The gate's scope; a separate one if it decides alone."""
        if self._scope is None and self.scope == "layer":
            self.join(GateScope([self]), 0)
        if self._scope is None:
            raise RuntimeError(
                f"{type(self).__name__} has scope 'model' and is not linked with the other "
                "layers' gates: call headwise.link_gates(model)"
            )
        return self._scope
