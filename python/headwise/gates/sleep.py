"""Heads that sleep and wake while the model trains."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.gates.distributed import pooled
from headwise.gates.recomputation import recomputing
from headwise.gates.scheduled import ScheduledGate
from headwise.gates.scope import GateScope, ScopedGate
from headwise.gates.selection import Selection, select_all
from headwise.io.printable import layer_called, quoted

_ops = torch.ops.headwise


class HeadMove(NamedTuple):
    """One head that :class:`SleepGate` put to sleep or woke."""

    step: int  # training forwards before it
    progress: float  # of annealing
    head: int
    event: str  # "sleeps" or "wakes"
    score: float  # of the head, when it moved


class SleepGate(ScopedGate, ScheduledGate):
    r"""Puts the least important heads to sleep in training, and wakes them when they matter.

    Ours, in the manner of dynamic sparse training (Evci et al., arXiv 1911.11134). Every training
    step scores every head by :math:`\sum_b |\partial L / \partial w_{bh}|`, the importance of
    Michel et al. (arXiv 1905.10650) for the head in its state, asleep or awake, in a running
    average. Every ``every`` steps the heads with the largest scores become awake, up to the number
    of the schedule. The score of an awake head counts :math:`1 + margin` times: a sleeping head
    replaces another one only if it has clearly recovered. A sleeping head has weight 0. With
    ``scope="model"`` layers compete, so heads move from one layer to another.

    The moves, with step and score, are in :attr:`moves` (for a model:
    :func:`headwise.gates.head_moves`). The list is copied and pickled with the gate, and
    :func:`headwise.save` and :func:`headwise.load` keep it.

    {options}

    Buffers: ``awake [H]`` of ones and zeros, ``score`` float32 ``[H]``, ``steps`` int64 ``[]``.

    Raises:
        ValueError: an argument out of its range.
        RuntimeError: a forward of a gate of scope ``"model"`` that is not linked.
    """

    awake: Tensor
    score: Tensor
    steps: Tensor
    _RECORDED = ("expected_heads", "_weight")

    def _prepare(self) -> None:
        super()._prepare()
        #: The moves in this layer, oldest first.
        self.moves: list[HeadMove] = []
        self._weight: Tensor | None = None

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        heads = self.num_heads
        self.register_buffer("awake", torch.ones(heads, device=device, dtype=dtype))
        self.register_buffer("score", torch.zeros(heads, device=device))
        self.register_buffer("steps", torch.zeros((), device=device, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Every head awake, no scores, no moves."""
        if self.num_heads is not None:
            self.progress.zero_()
            self.awake.fill_(1.0)
            self.score.zero_()
            self.steps.zero_()
            self.moves = []

    def _start(self, relevance: Tensor, budget: float) -> None:
        self.awake.copy_(relevance > 0)

    @torch.no_grad()
    def _advance(self) -> None:
        """Once per training forward of the model: adds the gradients of the last one, and moves
        heads if it is time."""
        members: list[Any] = self._joined().gates
        for gate in members:
            if gate._weight is not None and gate._weight.grad is not None:
                first = not bool(gate.score.any())
                total = gate._weight.grad.abs().sum(0, keepdim=True, dtype=torch.float32)  # [1, H]
                total = pooled(total, gate._groups)
                gate.score.copy_(_ops.update_head_score(gate.score, total, self.decay, first))
            gate._weight = None
        step = int(self.steps)
        for gate in members:
            gate.steps.add_(1)
        progress = float(self.progress)
        if step > 0 and step % self.every == 0 and progress < self.settled_from:
            self._move(members, step, progress)

    def _move(self, members: list[SleepGate], step: int, progress: float) -> None:
        before = torch.cat([gate.awake for gate in members])  # [N]
        score = torch.cat([gate.score for gate in members])  # [N]
        if len(score) and not bool(score.any()):
            warnings.warn(
                "no head of SleepGate has a score, so none moves: no finite gradient has reached "
                "the gates",
                stacklevel=2,
            )
            return
        heads = len(before)
        ramp = min(1.0, progress / self.asleep_by) if self.asleep_by > 0.0 else 1.0
        count = math.floor((1.0 - (1.0 - self.keep) * ramp) * heads + 0.5)
        count = min(max(count, min(1, heads)), heads)
        after = _ops.awake_heads(score, before, count, self.margin)  # [N]
        sizes = [gate.num_heads for gate in members]
        for gate, was, now in zip(members, before.split(sizes), after.split(sizes), strict=True):
            for head in (was != now).nonzero().flatten().tolist():
                event = "wakes" if now[head] else "sleeps"
                gate.moves.append(HeadMove(step, progress, head, event, float(gate.score[head])))
            gate.awake.copy_(now)

    def static_weight(self) -> Tensor:
        return self.awake.clone()

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        scope: GateScope = self._joined()
        awake, everyone, read = self.awake, False, True
        if self.training and recomputing():
            used = self._replay.recall(x)
            if used is not None:
                awake, everyone, differentiable, step = used
                # If the first forward had no graph, this one's gradient is read, unless a later
                # forward has replaced it.
                read = not differentiable and step == int(self.steps)
        elif self.training:
            if x.size(0) > 0 and scope.begins(self._position):
                self._advance()
            step = int(self.steps)
            everyone = self.execution == "all" or step % self.probe_every == 0
            self._replay.remember(
                x, lambda: (awake.clone(), everyone, torch.is_grad_enabled(), step)
            )
        weight = awake.to(x.dtype).expand(x.size(0), -1)  # [B, H]
        index, count = _ops.select_nonzero(weight)
        relevance = _ops.static_relevance(self.score, x)  # [B, H]
        if not self.training:
            return Selection(index, count, weight, relevance)
        # A leaf: after the backward its gradient is the value of each head for each sequence.
        weight = weight.clone().requires_grad_(everyone and torch.is_grad_enabled())
        if everyone:
            if read:
                self._weight = weight
            index, count = select_all(x.size(0), self.num_heads, device=x.device)[:2]
        self._record(expected_heads=weight.detach().sum(1))
        return Selection(index, count, weight, relevance)


def _sleeping(model: nn.Module) -> dict[str, SleepGate]:
    """The gates of a model that put heads to sleep, by the names of their layers."""
    return {
        name.removesuffix("gate").removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, SleepGate)
    }


def head_moves(model: nn.Module) -> list[dict[str, Any]]:
    """The moves of the :class:`SleepGate` gates of a model, oldest first, as JSON values.

    Returns:
        ``{"layer", "step", "progress", "head", "event", "score"}`` for each head that fell asleep
        (``"sleeps"``) or woke (``"wakes"``); ``layer`` is the name of the gate's layer.
    """
    found = [
        {"layer": name, **move._asdict()}
        for name, gate in _sleeping(model).items()
        for move in gate.moves
    ]
    return sorted(found, key=lambda move: move["step"])


def restore_moves(model: nn.Module, moves: Any, where: str) -> None:
    """Sets the moves of a model's gates to what :func:`head_moves` returned.

    Raises:
        ValueError: ``moves`` is not that, or is of other gates; the text begins with ``where``.
    """
    gates = _sleeping(model)
    if not isinstance(moves, list):
        raise ValueError(f"{where} must be a list, got {quoted(moves)}")
    own: dict[str, list[HeadMove]] = {name: [] for name in gates}
    for number, entry in enumerate(moves):
        move = _move(entry)
        if move is None:
            raise ValueError(f"entry {number} of {where} is not a move of a head: {quoted(entry)}")
        gate = gates.get(entry["layer"])
        if gate is None or move.head >= (gate.num_heads or 0):
            raise ValueError(
                f"entry {number} of {where} is of head {move.head} of "
                f"{layer_called(entry['layer'])}, "
                "which no SleepGate of the model has"
            )
        own[entry["layer"]].append(move)
    for name, gate in gates.items():
        gate.moves = own[name]


def _move(entry: Any) -> HeadMove | None:
    kinds = {"layer": str, "step": int, "progress": float, "head": int, "event": str,
             "score": float}  # fmt: skip
    if not isinstance(entry, dict) or set(entry) != set(kinds):
        return None
    for key, kind in kinds.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(entry[key], allowed) or isinstance(entry[key], bool):
            return None
    if entry["event"] not in ("sleeps", "wakes") or entry["step"] < 0 or entry["head"] < 0:
        return None
    return HeadMove(**{key: kinds[key](entry[key]) for key in HeadMove._fields})
