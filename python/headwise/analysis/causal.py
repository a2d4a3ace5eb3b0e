"""Causal head gating: which heads help a model, which hinder it, and which do neither."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.conversion import converted
from headwise.io.progress import with_progress
from headwise.io.store import Store
from headwise.nn.batches import batch_list
from headwise.nn.instrumenting import instrument, scaled_heads
from headwise.nn.intervention import (
    LossFunction,
    check_journal_loss,
    contents_of,
)
from headwise.pruning.scores import HeadScores

__all__ = ["CausalHeads", "causal_heads"]

_ROLES = ("facilitating", "interfering", "irrelevant")
_CHECKPOINT = 10  # steps between two entries of the journal
_NO_GRADIENT = (
    "loss_fn must return a loss that depends on the heads, got one whose gradient by every gate is "
    "zero"
)


@dataclass(frozen=True)
class CausalHeads:
    """The part that each head has in a model's loss, as degrees that sum to 1.

    Attributes:
        facilitating: layer name -> float64 ``[H]``: its gate stays open though pushed closed. As
            the next two, the mean over the fits.
        interfering: layer name -> float64 ``[H]``: its gate stays closed though pushed open.
        irrelevant: layer name -> float64 ``[H]``: its gate follows the push.
        scores: facilitating - interfering, in [-1, 1].
        strength: weight of the regulariser.
        by_fit: layer name -> float64 ``[S, 3, H]``, the three degrees in each of the S fits. If
            heads can replace each other, different fits keep different ones.
    """

    facilitating: Mapping[str, Tensor]
    interfering: Mapping[str, Tensor]
    irrelevant: Mapping[str, Tensor]
    scores: HeadScores
    strength: float
    by_fit: Mapping[str, Tensor]

    def roles(self, fit: int | None = None) -> dict[str, list[str]]:
        """layer name -> the largest degree of each head: of the means, or in one fit."""
        return {
            name: [
                _ROLES[place]
                for place in (degrees.mean(0) if fit is None else degrees[fit]).argmax(0).tolist()
            ]
            for name, degrees in self.by_fit.items()
        }


def causal_heads(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    strength: float | None = None,
    steps: int = 200,
    fits: int = 3,
    seed: int = 0,
    learning_rate: float = 0.1,
    limit: float = 4.0,
    journal: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> CausalHeads:
    """Fits a gate in (0, 1) to every head of the frozen model, once pushed open, once pushed
    closed.

    Causal head gating (arXiv 2505.13737), in the stages of its released code: from gates drawn
    uniformly, the loss alone is minimised; from there loss - strength * sum clip(logit of gate),
    once with +strength and once with -strength. A gate that stays open both times belongs to a head
    that facilitates the task, one that stays closed to a head that interferes with it, and one that
    follows the push to a head that is irrelevant. If heads can replace each other, the first stage,
    and so chance, decides which one is needed: this is why there are several ``fits``.

    If ``strength`` is large against what one head changes in the loss, every head is irrelevant; if
    it is small, steps decide. Ours: by default it follows the loss and the data, so that another
    unit of the loss changes no role. The released code's weight is 0.1 / (number of heads), for a
    loss in nats, at ``learning_rate=1``.

    Args:
        model: a converted or convertible model, run in evaluation mode and restored. Its own gates
            stay active.
        batches: input of ``loss_fn``; read once, kept, and used in turn.
        loss_fn: ``(model, batch) -> loss``, one per example ``[B]`` or their mean.
        strength: weight of the regulariser, above 0; None: half of the mean, over heads, of how
            much the loss of all ``batches`` changes with the logit of a gate that is half open
            (:attr:`CausalHeads.strength` has the value). The regulariser then moves the gate of a
            head that the loss holds with less than half the average force.
        steps: of Adam, in each of the three stages.
        fits: how many times to fit, from new random gates.
        seed: of the draw.
        learning_rate: of Adam.
        limit: logits stay within [-limit, limit]: gates within 1.8% of 0 and 1 for 4.
        journal: checkpoint file; an interrupted run resumes from it.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no batches, an option out of range, a loss that is not finite, or one that does
            not depend on the heads.
    """
    for name, value in (("strength", strength), ("learning_rate", learning_rate), ("limit", limit)):
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    for name, value in (("steps", steps), ("fits", fits)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    model = converted(model)
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to fit gates on")
    settings = {} if journal is None else {
        "strength": strength, "steps": steps, "seed": seed, "learning_rate": learning_rate,
        "limit": limit,
        **contents_of(model, batches),
    }  # fmt: skip
    log = Store(journal, "causal heads", settings)
    check_journal_loss(log, model, batches, loss_fn)
    with instrument(model) as opened, _frozen(model):
        scales = scaled_heads(opened)
        sizes = [len(scale) for scale in scales.values()]

        def loss_of(logits: Tensor, batch: Any) -> Tensor:
            parts = torch.sigmoid(logits).split(sizes)
            for name, part in zip(list(scales), parts, strict=True):
                scales[name] = part.to(scales[name])
            return loss_fn(model, batch)

        if strength is None:
            strength = log.get("strength") or _half_mean_gradient(loss_of, batches, sum(sizes))
            log.add("strength", strength)

        def stage(name: str, start: Tensor, push: float) -> Tensor:
            """float64 ``[T]``: the logits after ``steps`` of Adam from ``start``."""
            fit = _Fit(start.clone(), learning_rate, limit)
            fit.resume(log.get(name))
            for step in with_progress(range(fit.step, steps), f"gates {name}", "step", progress):
                fit.update(loss_of, batches[step % len(batches)], push)
                if fit.step % _CHECKPOINT == 0 or fit.step == steps:
                    log.add(name, fit.state())
            if not fit.moved:
                raise ValueError(_NO_GRADIENT)
            return fit.logits.detach()

        found = []
        for number in range(fits):
            generator = torch.Generator().manual_seed(seed + number)
            drawn = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
            free = stage(f"free {number}", drawn.logit().clamp(-limit, limit), 0.0)
            raised = stage(f"raised {number}", free, strength)
            lowered = stage(f"lowered {number}", free, -strength)
            degrees = torch.ops.headwise.causal_roles(raised.sigmoid(), lowered.sigmoid())
            found.append(torch.stack(degrees))  # [3, T]
        names = list(scales)
    by_fit = dict(zip(names, torch.stack(found).split(sizes, -1), strict=True))
    first, second, third = (
        {name: by_fit[name][:, i].mean(0) for name in names} for i in range(len(_ROLES))
    )
    worth = {name: first[name] - second[name] for name in names}
    return CausalHeads(first, second, third, HeadScores("causal", worth), strength, by_fit)


def _half_mean_gradient(loss_of, batches: Sequence[Any], count: int) -> float:
    """Half of the mean size of the loss's gradient by the logits of half-open gates."""
    total = torch.zeros(count, dtype=torch.float64)
    for batch in batches:
        total += _gradient(loss_of, batch, torch.zeros_like(total, requires_grad=True))
    if not total.any():
        raise ValueError(_NO_GRADIENT)
    return 0.5 * (total / len(batches)).abs().mean().item()


def _gradient(loss_of, batch: Any, logits: Tensor) -> Tensor:
    """float64 ``[T]``: of the mean loss, by the logits of all gates."""
    loss = loss_of(logits, batch).mean()
    if not torch.isfinite(loss):
        raise ValueError("loss_fn must return a finite loss, got NaN or infinity")
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    return torch.zeros_like(logits) if gradient is None else gradient


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Fit:
    """Adam (Kingma and Ba 2015) on the logits of all gates, with a JSON state."""

    def __init__(self, logits: Tensor, learning_rate: float, limit: float) -> None:
        self.logits = logits.requires_grad_()  # float64 [T]
        self.step = 0
        self.moved = False  # whether the loss ever had a gradient
        self._limit = limit
        self._adam = torch.optim.Adam([self.logits], lr=learning_rate)

    def update(self, loss_of, batch: Any, strength: float) -> None:
        gradient = _gradient(loss_of, batch, self.logits)
        self.moved = self.moved or bool(gradient.any())
        penalty = torch.ops.headwise.causal_penalty(self.logits, strength, self._limit)
        (push,) = torch.autograd.grad(penalty, self.logits)
        self.logits.grad = gradient + push
        self._adam.step()
        with torch.no_grad():
            self.logits.clamp_(-self._limit, self._limit)
        self.step += 1

    def state(self) -> dict[str, Any]:
        moments = self._adam.state[self.logits]
        return {
            "step": self.step,
            "moved": self.moved,
            "logits": self.logits.tolist(),
            "exp_avg": moments["exp_avg"].tolist(),
            "exp_avg_sq": moments["exp_avg_sq"].tolist(),
        }

    def resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.step, self.moved = state["step"], state["moved"]
        with torch.no_grad():
            self.logits.copy_(torch.tensor(state["logits"], dtype=torch.float64))
        self._adam.state[self.logits] = {
            "step": torch.tensor(float(self.step)),
            "exp_avg": torch.tensor(state["exp_avg"], dtype=torch.float64),
            "exp_avg_sq": torch.tensor(state["exp_avg_sq"], dtype=torch.float64),
        }
