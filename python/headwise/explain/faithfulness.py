"""Is the stated order of heads the order in which they matter? Heads are removed and it is seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.explain.one_input import Forward
from headwise.explain.recording import holding, recording
from headwise.explain.use import number

_ops = torch.ops.headwise


class _Margins:
    """Records each call's weights and how far each head's relevance lies above the cut."""

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
        # Where no head is left out there is no cut: the distance from the least relevant.
        lowest = relevance.amin(1, keepdim=True) if heads else relevance
        self.margins.append(torch.where(margin.isfinite(), margin, relevance - lowest))


def measure_faithfulness(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    *,
    points: int = 8,
    orders: int = 3,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Removes the heads that ran, least relevant first, and in random orders for comparison.

    At each of ``points`` equal steps that share of an input's heads is switched off, everything
    else held, and the log-probability of the class that the whole model predicted is read. If
    relevance says what matters, the stated order keeps it higher than random orders do: the area
    between the two curves, its mean over inputs with an interval by bootstrap, is the measure.
    (Deletion curves as in Samek et al. 2017, arXiv 1509.06321.)

    Args:
        model: a converted model in evaluation mode.
        batches: what ``forward`` takes.
        points: steps from all of the heads that ran to none.
        orders: random orders, averaged.
        resamples: of the bootstrap.
        seed: of the random orders and of the bootstrap.

    Returns:
        A part of the document ``headwise.use``; None for a model whose gates give no relevance.
    """
    generator = torch.Generator().manual_seed(seed)
    stated, shuffled = [], []
    for inputs in batches:
        recorder = _Margins()
        with recording(model, recorder):
            logits = forward(model, inputs).float()
        weights, margin = torch.cat(recorder.weights, 1), torch.cat(recorder.margins, 1)  # [B, M]
        if not recorder.sites or bool(margin.isnan().all()):
            return None
        predicted = logits.argmax(1)  # [B]
        # Heads without relevance are removed in their random place among the others.
        margin = torch.where(margin.isnan(), torch.randn(margin.shape, generator=generator), margin)

        def curve(order: Tensor, inputs=inputs, weights=weights, predicted=predicted, r=recorder):
            return _curve(model, inputs, forward, weights, order, predicted, r.sites, points)

        stated.append(curve(margin))
        rows = [
            curve(torch.rand(margin.shape, generator=generator)) for _ in range(orders)
        ]  # [B, points + 1] each
        shuffled.append(torch.stack(rows).mean(0))
    along = torch.arange(points + 1, dtype=torch.float64) / points
    first, other = torch.cat(shuffled).double(), torch.cat(stated).double()  # [N, points + 1]
    areas = torch.stack([_ops.area_between(along, a, b) for a, b in zip(first, other, strict=True)])
    areas = areas[:, None]  # [N, 1]
    mean, low, high = _ops.share_interval(areas, torch.ones_like(areas), resamples, seed)
    return {
        "inputs": len(areas),
        "removed": [number(value) for value in along],
        "stated": [number(value) for value in other.mean(0)],
        "random": [number(value) for value in first.mean(0)],
        "random_orders": orders,
        "area": number(mean[0]),
        "low": number(low[0]),
        "high": number(high[0]),
    }


def _curve(
    model: nn.Module,
    inputs: Any,
    forward: Forward,
    weights: Tensor,
    order: Tensor,
    predicted: Tensor,
    sites: Sequence[tuple[str, int]],
    points: int,
) -> Tensor:
    """Log-probability of ``predicted`` ``[B, points + 1]`` as heads go, lowest ``order`` first.

    weights, order ``[B, M]``.
    """
    on = weights != 0
    # Heads that do not run come last: there is nothing of them to remove.
    order = order.masked_fill(~on, float("inf"))
    place = order.argsort(dim=1, stable=True).argsort(dim=1)  # [B, M]
    running = on.sum(1, keepdim=True)  # [B, 1]
    values = []
    with holding(model) as held:
        for point in range(points + 1):
            gone = (running * point + points // 2) // points  # [B, 1]
            left = weights.masked_fill(place < gone, 0.0)
            of_layer: dict[str, list[Tensor]] = {name: [] for name in held}
            parts = left.split([heads for _, heads in sites], 1)
            for (name, _), part in zip(sites, parts, strict=True):
                of_layer[name].append(part)
            for name, gate in held.items():
                gate.hold(of_layer[name])
            scores = forward(model, inputs).float().cpu().log_softmax(1)  # [B, C]
            values.append(scores.gather(1, predicted.cpu()[:, None])[:, 0])
    return torch.stack(values, 1)
