"""Running a model on batches, and what a search needs to go on where it was interrupted."""

from __future__ import annotations

import hashlib
import math
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.io.journal import Journal
from headwise.nn.instrumenting import evaluating

__all__ = ["example_losses"]

#: ``(model, batch) -> loss``, of each example ``[B]``, or where a function says so their mean.
LossFunction = Callable[[nn.Module, Any], Tensor]
#: ``(model, batch) -> output``.
ForwardFunction = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def example_losses(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """float64 ``[N]``: the loss of every example, on the CPU.

    Raises:
        ValueError: no batches, or a loss that is not a finite vector of one loss an example.
    """
    found = []
    for batch in batches:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 1:
            raise ValueError(
                "loss_fn must return one loss an example [B], got "
                + (f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss))
            )
        found.append(loss.double().cpu())
    losses = torch.cat(found) if found else torch.empty(0)
    if losses.numel() == 0:
        raise ValueError("batches must not be empty: there is nothing to measure heads on")
    if not torch.isfinite(losses).all():
        raise ValueError("loss_fn must return a finite loss, got NaN or infinity")
    return losses


def fingerprint(model: nn.Module, batches: Sequence[Any]) -> dict[str, str]:
    """Short names of a model's weights and of data, by which a search that goes on knows them.

    Of data, tensors, arrays and plain values count, in containers and attributes too, and of other
    objects what pickle keeps of them.

    Raises:
        ValueError: data of which that cannot be told.
    """
    weights, data = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    _digest(weights, model.state_dict())
    _digest(data, batches)
    return {"model": weights.hexdigest(), "data": data.hexdigest()}


@torch.no_grad()
def check_journal_loss(
    journal: Journal, model: nn.Module, batches: Sequence[Any], loss_fn: LossFunction
) -> None:
    """Refuses to go on from a journal that another loss was written to.

    The mean loss of the first batch goes into the journal; one that is there must be the same up to
    rounding.

    Raises:
        ValueError: it is not.
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
            f"'{journal.path}' is a journal of another loss: of the first batch it was "
            f"{before:.6g}, and is {loss:.6g}; remove it or give another file"
        )


def _digest(digest: Any, value: Any) -> None:
    """Takes in ``value``: what it is and how long, then what it holds, so that no two collide."""

    def put(kind: str, about: Any = "") -> None:
        digest.update(f"{kind} {about}\0".encode())

    if isinstance(value, Tensor):
        put("tensor", f"{value.dtype} {tuple(value.shape)}")
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        put("mapping", len(value))
        for key, item in value.items():
            _digest(digest, key)
            _digest(digest, item)
    elif isinstance(value, (list, tuple)):
        put("sequence", len(value))
        for item in value:
            _digest(digest, item)
    elif isinstance(value, (str, bytes, bool, int, float, complex)) or value is None:
        put("value", repr(value))
    elif isinstance(value, (set, frozenset)):
        _digest(digest, sorted(map(repr, value)))
    elif hasattr(value, "__array_interface__"):  # NumPy's
        put("array", f"{value.dtype} {value.shape} {value.tolist()!r}")
    else:
        put("object", type(value).__name__)
        _digest(digest, _content(value))


def _content(value: Any) -> Any:
    """What an object holds: its attributes, or what pickle would keep of it."""
    held = dict(getattr(value, "__dict__", {}))
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    held |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    if held:
        return held
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises what it likes
        raise ValueError(
            f"batches hold a {type(value).__name__}, of which a journal cannot tell whether it is "
            f"the same as before: {error}"
        ) from None


def with_progress(items: Iterable[Any], what: str, unit: str, show: bool | None) -> Iterable[Any]:
    """``items`` behind a progress bar on stderr; None: where that is a terminal."""
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, leave=False)
