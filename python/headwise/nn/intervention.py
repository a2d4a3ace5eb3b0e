"""Running a model on batches, and what a search needs to resume after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.io.fingerprint import fingerprint
from headwise.io.store import Store
from headwise.nn.batches import check_batches
from headwise.nn.instrumenting import evaluating

__all__ = ["example_losses"]

#: ``(model, batch) -> loss``, of each example ``[B]``; some functions also accept their mean.
LossFunction = Callable[[nn.Module, Any], Tensor]
#: ``(model, batch) -> output``.
ForwardFunction = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def example_losses(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction, what: str = "loss"
) -> Tensor:
    """float64 ``[N]``: the loss (or another value, named ``what``) of every example, on the CPU.

    Raises:
        ValueError: no batches, or a loss that is not a finite vector with one loss per example.
    """
    check_batches(batches)
    found = []
    for batch in batches:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 1:
            raise ValueError(
                f"{what}_fn must return one {what} per example [B], got "
                + (f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss))
            )
        found.append(loss.double().cpu())
    losses = torch.cat(found) if found else torch.empty(0)
    if losses.numel() == 0:
        raise ValueError("batches must not be empty: there is nothing to measure heads on")
    if not torch.isfinite(losses).all():
        raise ValueError(f"{what}_fn must return a finite {what}, got NaN or infinity")
    return losses


def contents_of(model: nn.Module, batches: Sequence[Any]) -> dict[str, str]:
    """The fingerprints of model and data in a search's key."""
    return {"model": fingerprint(model), "data": fingerprint(batches)}


@torch.no_grad()
def check_journal_loss(
    journal: Store, model: nn.Module, batches: Sequence[Any], loss_fn: LossFunction
) -> None:
    """Raises an error for a journal of another loss.

    The mean loss of the first batch is written to the journal; an existing one must be the same up
    to rounding.

    Raises:
        ValueError: it differs.
    """
    if journal.path is None:
        return
    with evaluating(model):
        loss = torch.as_tensor(loss_fn(model, batches[0])).double().mean().item()
    if not math.isfinite(loss):
        raise ValueError("loss_fn must return a finite loss, got NaN or infinity")
    step = "loss of the first batch"
    before = journal.get(step)
    if before is None:
        journal.add(step, loss)
    elif not math.isclose(before, loss, rel_tol=1e-4, abs_tol=1e-6):
        raise ValueError(
            f"'{journal.path}' is of another loss: of the first batch it was "
            f"{before:.6g}, and is {loss:.6g}; remove it or give another file"
        )
