"""Which heads can replace each other: joint ablation, and the similarity of heads' outputs.

Which one should you use? ``head_similarity`` needs no loss and compares all pairs in one pass:
heads with the same outputs. ``head_interactions`` costs one evaluation per pair and measures the
consequence for the task: pairs of which either head can be removed, but not both.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.analysis.ablation import LossesByIntervention
from headwise.convert.conversion import converted
from headwise.gates.padding import is_padding
from headwise.io.printable import quoted
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.batches import batch_list, check_batches
from headwise.nn.instrumenting import instrument, scaled_heads
from headwise.nn.intervention import LossFunction

__all__ = ["HeadInteractions", "HeadSimilarity", "head_interactions", "head_similarity"]

Head = tuple[str, int]


@dataclass(frozen=True)
class HeadInteractions:
    """Second-order effects of pairs of heads.

    Attributes:
        pairs: ((layer, head), (layer, head)) of each pair.
        effect: float64 ``[P]``, joint ablation minus the sum of the single ones: above 0, either
            head can replace the other; below 0, one is useful only with the other.
        standard_error: float64 ``[P]``, of the effect, over the examples.
        single: (layer, head) -> the increase of the loss without that head alone.
    """

    pairs: list[tuple[Head, Head]]
    effect: Tensor
    standard_error: Tensor
    single: dict[Head, float]

    def substitutes(self, errors: float = 2.0) -> list[tuple[Head, Head, float]]:
        """Pairs with an effect above 0 by more than ``errors`` standard errors, largest first."""
        found = [
            (*pair, effect)
            for pair, effect, error in zip(
                self.pairs, self.effect.tolist(), self.standard_error.tolist(), strict=True
            )
            if effect > errors * error
        ]
        return sorted(found, key=lambda entry: -entry[2])


def head_interactions(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    pairs: int | Sequence[tuple[Head, Head]] = 100,
    *,
    within_layer: bool = False,
    seed: int = 0,
    journal: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> HeadInteractions:
    """Second-order effects: what two heads together are worth beyond what each is worth alone.

    For every pair, [L(without both) - L] - [L(without one) - L] - [L(without the other) - L], its
    mean over the examples and the standard error of that mean. Costs one evaluation of the data per
    pair, and one per head in a pair.

    Args:
        model: a converted or convertible model, run in evaluation mode and restored.
        batches: input of ``loss_fn``; read once and kept.
        loss_fn: ``(model, batch) -> [B]``, one loss per example, the smaller the better.
        pairs: how many pairs to draw at random (all, if there are fewer), or the pairs.
        within_layer: only pairs of heads of one layer.
        seed: of the draw.
        journal: checkpoint file; an interrupted run resumes from it.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no pairs, a pair of heads that the model does not have, no batches, a loss that
            is not finite or not one per example, or one that no head changes.
    """
    model = converted(model)
    batches = batch_list(batches)
    measured = LossesByIntervention("head interactions", model, batches, loss_fn, journal)
    with instrument(model) as opened:
        scales = scaled_heads(opened)
        heads = [(name, head) for name, scale in scales.items() for head in range(len(scale))]
        chosen = _pairs(heads, pairs, within_layer, seed)
        full = measured.full()  # [N]
        single = sorted({head for pair in chosen for head in pair}, key=heads.index)
        subsets = [(head,) for head in single] + list(chosen)
        losses: dict[tuple[Head, ...], Tensor] = {}
        for subset in with_progress(subsets, "head interactions", "ablation", progress):
            for name, head in subset:
                scales[name][head] = 0.0
            key = "+".join(f"{name}/{head}" for name, head in sorted(subset, key=heads.index))
            losses[subset] = measured(key)
            for name, head in subset:
                scales[name][head] = 1.0
    first, second, both = (
        torch.stack([losses[key(pair)] for pair in chosen])  # [P, N]
        for key in (lambda pair: pair[:1], lambda pair: pair[1:], lambda pair: pair)
    )
    if torch.equal(both, full.expand_as(both)) and all(
        torch.equal(losses[(head,)], full) for head in single
    ):
        raise ValueError(
            "the loss does not depend on the heads of these pairs, or is too coarse to show it"
        )
    effect, error = torch.ops.headwise.second_order_effect(full, first, second, both)
    worth = {head: (losses[(head,)] - full).mean().item() for head in single}
    return HeadInteractions(chosen, effect, error, worth)


def _pairs(
    heads: list[Head],
    pairs: int | Sequence[tuple[Head, Head]],
    within_layer: bool,
    seed: int,
) -> list[tuple[Head, Head]]:
    if isinstance(pairs, int):
        if pairs <= 0:
            raise ValueError(f"pairs must be positive, got {pairs}")
        found = [
            pair
            for pair in itertools.combinations(heads, 2)
            if not within_layer or pair[0][0] == pair[1][0]
        ]
        if not found:
            raise ValueError("model must have at least two heads to pair")
        if pairs < len(found):
            found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), pairs))]
        return found
    try:
        given: list[tuple[Any, Any]] = [(tuple(one), tuple(other)) for one, other in pairs]
    except (TypeError, ValueError):
        raise ValueError(
            "pairs must be a number, or pairs of heads ((layer, head), (layer, head)), got "
            f"{quoted(pairs)}"
        ) from None
    if not given:
        raise ValueError("pairs must not be empty")
    known = set(heads)
    for one, other in given:
        for head in (one, other):
            if head not in known:
                raise ValueError(
                    f"pairs must be of the model's heads (layer, head), got {quoted(head)}"
                )
        if within_layer and one[0] != other[0]:
            raise ValueError(
                "pairs must be of heads of one layer with within_layer=True, got "
                f"{quoted((one, other))}"
            )
        if one == other:
            raise ValueError(f"pairs must be of two different heads, got {quoted(one)} twice")
    return given


@dataclass(frozen=True)
class HeadSimilarity:
    """The similarity of heads' outputs.

    Attributes:
        heads: (layer, head) of each row.
        matrix: float64 ``[T, T]``, linear CKA: 1 for outputs that are equal up to rotation and
            scale, 0 for unrelated ones.
        tokens: number of tokens of the measurement.
    """

    heads: list[Head]
    matrix: Tensor
    tokens: int

    def most_similar(self, count: int = 10) -> list[tuple[Head, Head, float]]:
        """The pairs of largest similarity, largest first."""
        rows, columns = torch.triu_indices(len(self.heads), len(self.heads), 1)
        values = self.matrix[rows, columns]
        order = torch.argsort(values, descending=True, stable=True)[:count].tolist()
        return [(self.heads[rows[i]], self.heads[columns[i]], values[i].item()) for i in order]


def head_similarity(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any],
    *,
    max_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> HeadSimilarity:
    """Linear centred kernel alignment between the outputs of all heads, over tokens.

    Kornblith et al. 2019 (arXiv 1905.00414), on each head's output before the output projection and
    before a gate's weight. Padding is left out. The estimate is biased upwards unless there are
    many times more tokens than the width of a head.

    Args:
        model: a converted or convertible model, run in evaluation mode and restored.
        batches: input of ``forward_fn``.
        forward_fn: ``(model, batch)`` runs the model; its result is not used.
        max_tokens: how many tokens to draw, uniformly from all of them.
        seed: of the draw.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: fewer than two tokens, layers that see different tokens (cross-attention), or
            outputs that are not finite.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    check_batches(batches)
    model = converted(model)
    sample = _TokenSample(max_tokens, seed)
    with torch.no_grad(), instrument(model) as opened:
        opened.probe(sample.see)
        for batch in with_progress(batches, "head similarity", "batch", progress):
            forward_fn(model, batch)
            sample.end_batch()
    if sample.size < 2:
        raise ValueError(f"batches must have at least two tokens, got {sample.size}")
    heads, outputs = [], []
    for name, kept in sample.kept.items():
        for head, output in enumerate(kept[: sample.size].unbind(1)):
            heads.append((name, head))
            outputs.append(output)  # [n, d]
    if not heads:
        raise ValueError("model must have heads, got attention layers without any")
    return HeadSimilarity(heads, torch.ops.headwise.linear_cka(outputs), sample.size)


class _TokenSample:
    """Heads' outputs at tokens drawn uniformly from a stream (reservoir sampling)."""

    def __init__(self, limit: int, seed: int) -> None:
        self.kept: dict[str, Tensor] = {}  # layer -> float64 [limit, H, d]
        self.size = 0
        self._limit = limit
        self._seen = 0
        self._random = random.Random(seed)
        self._batch: dict[str, Tensor] = {}  # layer -> [tokens, H, d]

    def see(self, name: str, layer: AttentionLayer, probe: AttentionProbe) -> None:
        tokens = probe.context.transpose(1, 2)  # [B, L, H, d]
        padding = probe.query_padding_mask
        if padding is None:
            self._batch[name] = tokens.flatten(0, 1)
        else:
            self._batch[name] = tokens[~is_padding(padding)]

    def end_batch(self) -> None:
        sizes = {name: len(tokens) for name, tokens in self._batch.items()}
        if not sizes:
            raise ValueError("forward_fn must run model: none of its attention layers was called")
        if len(set(sizes.values())) > 1:
            one, other = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            raise ValueError(
                "layers must see the same tokens to be compared, got "
                f"{sizes[one]} in '{one}' and {sizes[other]} in '{other}'"
            )
        source: dict[int, int] = {}  # place in the sample -> token of this batch
        for token in range(next(iter(sizes.values()))):
            place = self._seen
            if place >= self._limit:
                place = self._random.randrange(self._seen + 1)
            if place < self._limit:
                source[place] = token
            self._seen += 1
        self.size = min(self._seen, self._limit)
        places, tokens = list(source), list(source.values())
        for name, values in self._batch.items():
            if name not in self.kept:
                self.kept[name] = torch.zeros(self._limit, *values.shape[1:], dtype=torch.float64)
            self.kept[name][places] = values[tokens].double().cpu()
        self._batch.clear()
