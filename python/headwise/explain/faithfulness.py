"""Does the gates' ranking match the heads' measured effect? Measured by removing heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.explain.recording import holding, recording
from headwise.explain.use import number
from headwise.io.fingerprint import fingerprint
from headwise.io.store import Store
from headwise.nn.intervention import ForwardFunction

_ops = torch.ops.headwise


class _Margins:
    """Records each call's weights and how far each head's relevance is above the cut."""

    def __init__(self) -> None:
        self.sites: list[tuple[str, int]] = []  # (layer, heads)
        self.weights: list[Tensor] = []  # [B, H] each
        self.margins: list[Tensor] = []  # [B, H] each; NaN without relevance

    def __call__(self, name, layer, selection, x, probe) -> None:
        batch, heads = probe.q.size(0), layer.num_heads
        self.sites.append((name, heads))
        if selection is None:
            self.weights.append(torch.ones(batch, heads))
            self.margins.append(torch.full((batch, heads), float("nan")))
            return
        self.weights.append(selection.weight.float().cpu())
        relevance = selection.relevance
        if relevance is None:
            self.margins.append(torch.full((batch, heads), float("nan")))
            return
        relevance = relevance.float().cpu()
        chosen = _ops.selection_mask(selection.index, selection.count, torch.float32).bool().cpu()
        margin = _ops.selection_margin(relevance, chosen)  # [B, H]
        # If all heads run there is no cut: the distance from the least relevant.
        lowest = relevance.amin(1, keepdim=True) if heads else relevance
        self.margins.append(torch.where(margin.isfinite(), margin, relevance - lowest))


def measure_faithfulness(
    model: nn.Module,
    batches: Sequence[Any],
    forward_fn: ForwardFunction,
    *,
    points: int = 8,
    orders: int = 3,
    resamples: int = 1000,
    seed: int = 0,
    store: Store | None = None,
    done: Callable[[int], None] = lambda runs: None,
) -> dict[str, Any] | None:
    """Removes the heads that ran, least relevant first, and in random orders for comparison.

    At each of ``points`` equal steps that share of an input's heads is switched off, with
    everything else held fixed, and the log-probability of the class that the whole model predicted
    is measured. If relevance reflects importance, the stated order keeps it higher than random
    orders. The measure is the area between the two curves, averaged over inputs, with a bootstrap
    interval. (Deletion curves as in Samek et al. 2017, arXiv 1509.06321.)

    Args:
        model: a converted model in evaluation mode.
        batches: what ``forward_fn`` takes.
        points: number of steps from all heads that ran to none.
        orders: random orders, averaged.
        resamples: of the bootstrap.
        seed: of the random orders and of the bootstrap.
        store: keeps the curves of finished batches.
        done: called with the number of forwards after each batch (:func:`forwards_of`).

    Returns:
        A part of the document ``headwise.use``; None if the model's gates give no relevance.
    """
    store = Store(None, "faithfulness", {}) if store is None else store
    found = []
    for number_, inputs in enumerate(batches):

        def compute(inputs=inputs, number_=number_) -> dict[str, Tensor]:
            # Each batch draws its own orders, so that a stored one does not change the others.
            generator = torch.Generator().manual_seed(seed + 7919 * number_)
            return _batch_curves(model, inputs, forward_fn, points, orders, generator)

        found.append(
            store.tensors(
                f"curves/{points}/{orders}/{seed}/{number_}/{fingerprint(inputs)}", compute
            )
        )
        if not found[-1]["stated"].numel():
            return None
        done(forwards_of(points, orders))
    along = torch.arange(points + 1, dtype=torch.float64) / points
    stated, other = (
        torch.cat([part[key] for part in found]).double() for key in ("stated", "random")
    )  # [N, points + 1]
    areas = torch.stack(
        [_ops.area_between(along, a, b) for a, b in zip(other, stated, strict=True)]
    )[:, None]  # [N, 1]
    mean, low, high = _ops.share_interval(areas, torch.ones_like(areas), resamples, seed)
    return {
        "inputs": len(areas),
        "removed": [number(value) for value in along],
        "stated": [number(value) for value in stated.mean(0)],
        "random": [number(value) for value in other.mean(0)],
        "random_orders": orders,
        "area": number(mean[0]),
        "low": number(low[0]),
        "high": number(high[0]),
    }


def forwards_of(points: int = 8, orders: int = 3) -> int:
    """Forwards per input of :func:`measure_faithfulness`."""
    return 2 + (points - 1) * (1 + orders)


def _batch_curves(
    model: nn.Module,
    inputs: Any,
    forward_fn: ForwardFunction,
    points: int,
    orders: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``stated`` and ``random`` (its mean over orders) ``[B, points + 1]``; empty if gates give no
    relevance."""
    recorder = _Margins()
    with recording(model, recorder):
        logits = forward_fn(model, inputs).float().cpu()
    nothing = torch.zeros(0, points + 1)
    if not recorder.sites:
        return {"stated": nothing, "random": nothing.clone()}
    weights, margin = torch.cat(recorder.weights, 1), torch.cat(recorder.margins, 1)  # [B, M]
    if bool(margin.isnan().all()):
        return {"stated": nothing, "random": nothing.clone()}
    predicted = logits.argmax(1, keepdim=True)  # [B, 1]
    # Heads without relevance are removed at random places among the others.
    margin = torch.where(margin.isnan(), torch.randn(margin.shape, generator=generator), margin)
    with holding(model, [name for name, _ in recorder.sites]) as hold:

        def told(left: Tensor) -> Tensor:
            """Log-probability of the prediction ``[B]`` with these weights ``[B, M]``."""
            hold(left.split([heads for _, heads in recorder.sites], 1))
            scores = forward_fn(model, inputs).float().cpu().log_softmax(1)  # [B, C]
            return scores.gather(1, predicted)[:, 0]

        # All orders begin with every head that ran and end with none.
        first = logits.log_softmax(1).gather(1, predicted)[:, 0]
        last = told(torch.zeros_like(weights))

        def curve(order: Tensor) -> Tensor:
            between = [told(left) for left in _removed(weights, order, points)]
            return torch.stack([first, *between, last], 1)

        stated = curve(margin)
        random = [curve(torch.rand(margin.shape, generator=generator)) for _ in range(orders)]
    return {"stated": stated, "random": torch.stack(random).mean(0)}


def _removed(weights: Tensor, order: Tensor, points: int) -> Iterator[Tensor]:
    """The weights ``[B, M]`` as heads are removed, lowest ``order`` first, from all to none of
    them."""
    on = weights != 0
    # Heads that do not run come last: they cannot be removed.
    order = order.masked_fill(~on, float("inf"))
    place = order.argsort(dim=1, stable=True).argsort(dim=1)  # [B, M]
    running = on.sum(1, keepdim=True)  # [B, 1]
    for point in range(1, points):
        gone = (running * point + points // 2) // points  # [B, 1]
        yield weights.masked_fill(place < gone, 0.0)
