"""How a model's heads are used over a data set: how often, for which inputs, and together with
which heads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers

_ops = torch.ops.headwise

#: Phi coefficient below which two heads of a layer count as alternatives.
SUBSTITUTES_PHI = -0.3
#: Groups of equal size by length that `by_length` reports.
LENGTH_GROUPS = 4


@dataclass(frozen=True)
class Use:
    """Which heads ran for each input of a data set, and what the model predicted.

    Attributes:
        sites: (name of the layer, number of its call, number of heads) of each site.
        chosen: bool ``[N, M]``, M heads of all sites together.
        logits: float32 ``[N, C]``.
        length: int64 ``[N]``, tokens.
        entropy: float64 ``[N]``, bits, of the input's distribution of tokens.
        labels: int64 ``[N]``, or None.
    """

    sites: list[tuple[str, int, int]]
    chosen: Tensor
    logits: Tensor
    length: Tensor
    entropy: Tensor
    labels: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """int64 ``[N]``"""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """float64 ``[N]``: probability of the predicted class."""
        return self.logits.double().softmax(1).amax(1)


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[list[tuple[str, Tensor | None]]]:
    """Appends (layer, chosen bool ``[B, H]``) for every call of a gated layer to the list."""
    seen: list[tuple[str, Tensor | None]] = []

    def observe(name: str, layer, selection, x, padding) -> None:
        mask = _ops.selection_mask(selection.index, selection.count, torch.float32)
        seen.append((name, mask.bool().cpu()))

    with instrument(model, evaluate=False) as opened:
        opened.observe(observe)
        yield seen


def chosen_heads(
    seen: Sequence[tuple[str, Any]], model: nn.Module, batch: int
) -> tuple[list[tuple[str, int, int]], Tensor]:
    """Sites and bool ``[B, M]`` of one forward. A layer without a gate has one site, all on."""
    layers = attention_layers(model)
    gated = {name for name, layer in layers.items() if layer.gate is not None}
    calls: dict[str, int] = {}
    sites, parts = [], []
    if len(gated) == len(layers):
        for name, mask in seen:
            sites.append((name, calls.get(name, 0), mask.size(1)))
            calls[name] = calls.get(name, 0) + 1
            parts.append(mask)
    else:
        found = dict(seen)
        for name, layer in layers.items():
            sites.append((name, 0, layer.num_heads))
            parts.append(found.get(name, torch.ones(batch, layer.num_heads, dtype=torch.bool)))
    return sites, torch.cat(parts, 1)


def token_entropy(ids: Tensor, content: Tensor) -> Tensor:
    """The entropy of each input's own distribution of tokens, in bits: float64 ``[B]``. Repetition
    lowers it."""
    values = []
    for row, keep in zip(ids, content, strict=True):
        counts = row[keep].unique(return_counts=True)[1].double()
        share = counts / counts.sum().clamp(min=1)
        values.append(-(share * share.log2()).sum())
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def describe_use(
    use: Use, classes: Sequence[str], *, permutations: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The statistics of :class:`Use`, as a part of the document ``headwise.use``."""
    chosen = use.chosen
    frequency = chosen.double().mean(0)  # [M]
    count = chosen.sum(1).double()  # [N]
    bits, chance, p = _ops.selection_information(
        chosen, use.predicted, len(classes), permutations, seed
    )
    varies = (frequency > 0) & (frequency < 1)
    information = _tested(varies, {"bits": bits, "by_chance": chance}, p)
    properties = {
        "length": use.length.double(),
        "entropy": use.entropy,
        "confidence": use.confidence,
    }
    associations = {}
    for name, values in properties.items():
        correlation, p = _ops.selection_association(chosen, values, permutations, seed)
        associations[name] = _tested(varies, {"correlation": correlation}, p)
    by_class = [
        chosen[use.predicted == label].double().mean(0) if (use.predicted == label).any() else None
        for label in range(len(classes))
    ]
    phi = _ops.co_selection(chosen)
    layers, start = [], 0
    for site, (name, call, heads) in enumerate(use.sites):
        layers.append(
            {
                "site": site,
                "name": name,
                "call": call,
                "num_heads": heads,
                "heads": [
                    {
                        "head": head,
                        "frequency": number(frequency[start + head]),
                        "by_class": [
                            None if rates is None else number(rates[start + head])
                            for rates in by_class
                        ],
                        "information": information[start + head],
                        **{key: rows[start + head] for key, rows in associations.items()},
                    }
                    for head in range(heads)
                ],
            }
        )
        start += heads
    return {
        "heads": int(chosen.size(1)),
        "heads_mean": number(count.mean()),
        "heads_std": number(count.std(correction=0)),
        "heads_min": int(count.min()),
        "heads_max": int(count.max()),
        "always": int((frequency == 1).sum()),
        "never": int((frequency == 0).sum()),
        "by_length": _by_length(use, count),
        "heads_and": {
            name: number(_more_heads(count, values, permutations, seed))
            for name, values in properties.items()
        },
        "layers": layers,
        "together": _together(use.sites, phi),
        "substitutes": _substitutes(use.sites, phi),
    }


def _tested(varies: Tensor, columns: dict[str, Tensor], p: Tensor) -> list[dict[str, Any] | None]:
    """A row for each head with p and its false discovery rate; None for heads that never vary."""
    q = _ops.false_discovery_rate(p.masked_fill(~varies, float("nan")))
    return [
        {
            **{key: number(values[head]) for key, values in columns.items()},
            "p": number(p[head]),
            "q": number(q[head]),
        }
        if varies[head]
        else None
        for head in range(len(p))
    ]


def _by_length(use: Use, count: Tensor) -> list[dict[str, Any]]:
    order = use.length.argsort(stable=True)
    groups = order.chunk(min(LENGTH_GROUPS, len(order)))
    return [
        {
            "from": int(use.length[rows].min()),
            "to": int(use.length[rows].max()),
            "inputs": len(rows),
            "heads_mean": number(count[rows].mean()),
        }
        for rows in groups
    ]


def _more_heads(count: Tensor, values: Tensor, permutations: int, seed: int) -> Tensor | None:
    """The correlation of running more heads than the median input with a property of the input."""
    more = (count > count.median())[:, None]  # [N, 1]
    if not more.any():
        return None
    return _ops.selection_association(more, values, permutations, seed)[0][0]


def _names(sites: Sequence[tuple[str, int, int]]) -> list[list[int]]:
    return [[site, head] for site, (_, _, heads) in enumerate(sites) for head in range(heads)]


def _together(sites: Sequence[tuple[str, int, int]], phi: Tensor, limit: int = 20) -> list[dict]:
    """The pairs of heads most often chosen together, or separately, given their frequencies."""
    names = _names(sites)
    upper = phi.triu(1)
    order = upper.abs().flatten().argsort(descending=True)[:limit].tolist()
    rows = []
    for place in order:
        a, b = divmod(place, len(names))
        if upper[a, b] != 0:
            rows.append({"first": names[a], "second": names[b], "phi": number(upper[a, b])})
    return rows


def _substitutes(sites: Sequence[tuple[str, int, int]], phi: Tensor) -> list[dict[str, Any]]:
    """Groups of heads of a layer, one of which tends to be chosen when another is not."""
    names = _names(sites)
    linked = (phi <= SUBSTITUTES_PHI).triu(1).nonzero().tolist()
    pairs = [(tuple(names[a]), tuple(names[b])) for a, b in linked if names[a][0] == names[b][0]]
    groups = linked_groups(pairs)
    place = {tuple(name): position for position, name in enumerate(names)}
    for group in groups:
        members = [place[group["site"], head] for head in group["heads"]]
        group["phi_min"] = number(phi[members][:, members].min())
    return groups


def linked_groups(pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> list[dict[str, Any]]:
    """Heads (site, head) that pairs of one site link, directly or through others, as groups."""
    groups: list[set[tuple[int, int]]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched]
        groups.append(set(pair).union(*touched))
    rows = [sorted(group) for group in groups]
    return [{"site": row[0][0], "heads": [head for _, head in row]} for row in sorted(rows)]


def number(value: Tensor | float | None) -> float | None:
    """Four significant digits; None if not finite."""
    if value is None:
        return None
    value = float(value)
    return float(f"{value:.4g}") if value - value == 0.0 else None
