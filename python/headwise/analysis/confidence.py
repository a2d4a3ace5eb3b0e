"""A head budget that follows the confidence of the prediction: stop early, or widen and run again.

Contextual adaptation as a policy over any gate: every input first runs few of the heads that its
gates rank highest; where the prediction is not sure enough, it runs again with more of them.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates import FixedGate
from headwise.gates.selection import Selection
from headwise.nn.intervention import evaluating
from headwise.nn.layers import attention_layers
from headwise.pruning.scores import HeadScores

__all__ = ["ConfidencePolicy", "FittedPolicy", "StagedPrediction"]

MEASURES = ("probability", "margin", "entropy")
_ops = torch.ops.headwise


@dataclass(frozen=True)
class StagedPrediction:
    """What a :class:`ConfidencePolicy` said of a batch, and why.

    Attributes:
        logits: floating ``[B, C]``, of the stage at which each input stopped.
        stage: int64 ``[B]``, that stage.
        confidence: floating ``[S, B]``, after every stage; NaN where an input did not get there.
        heads: int64 ``[S, B]``, heads of all layers that each stage ran; 0 where it did not.
        threshold: the confidence that was asked for.
    """

    logits: Tensor
    stage: Tensor
    confidence: Tensor
    heads: Tensor
    threshold: float

    @property
    def total_heads(self) -> Tensor:
        """int64 ``[B]``: heads that each input ran, all stages together."""
        return self.heads.sum(0)

    def reason(self, row: int) -> str:
        """Why input ``row`` ran as many heads as it did, in words."""
        steps = []
        last = int(self.stage[row])
        for stage in range(last + 1):
            sure = float(self.confidence[stage, row])
            heads = int(self.heads[stage, row])
            if stage < last:
                steps.append(
                    f"{heads} heads: confidence {sure:.2f} < {self.threshold:.2f}, widened"
                )
            elif sure >= self.threshold:
                steps.append(
                    f"{heads} heads: confidence {sure:.2f} >= {self.threshold:.2f}, stopped"
                )
            else:
                steps.append(f"{heads} heads: confidence {sure:.2f}, the widest budget")
        return "; ".join(steps)


@dataclass(frozen=True)
class FittedPolicy:
    """What :meth:`ConfidencePolicy.fit_accuracy` found, on the data it was given.

    Attributes:
        threshold: that the policy now has.
        heads: that an input runs on average, all stages together.
        accuracy: of the policy.
        widest_heads: that the widest stage alone runs on average.
        widest_accuracy: of the widest stage alone.
    """

    threshold: float
    heads: float
    accuracy: float
    widest_heads: float
    widest_accuracy: float

    @property
    def pays(self) -> bool:
        """Whether the policy runs fewer heads than the widest stage alone."""
        return self.heads < self.widest_heads


class ConfidencePolicy:
    """Runs a model on a small head budget, and on wider ones where it is not sure.

    Stage s multiplies the number of heads that each gate gives an input by ``factors[s]`` (rounded,
    half up; at least one head where the gate gave any, at most all). Which heads those are follows
    the gate's own relevance; for a gate that has none (:class:`FixedGate`, or no gate, which is all
    heads) it follows ``ranking``. Heads that the gate chose keep their weight; added ones have
    weight 1. A later stage runs the model anew: what an input costs is the sum of its stages.

    Args:
        model: a converted classifier; it is not changed.
        factors: of the budget, ascending; 1 is what the gates choose.
        threshold: an input whose confidence reaches it stops.
        measure: of confidence: "probability" (the largest), "margin" (to the second), or "entropy"
            (1 - entropy / ln C).
        ranking: importance of heads, for layers whose gates have no relevance.
        forward_fn: ``(model, batch) -> logits [B, C]``; default: ``model(**batch)`` for mappings,
            ``model(*batch)`` for tuples and lists, else ``model(batch)``; of what that gives, its
            ``logits`` where it has them.
        take: ``(batch, rows) -> batch`` with only those rows (int64); default: of every tensor in a
            mapping, tuple or list, or of the tensor.

    Raises:
        ValueError: factors that are not positive and ascending, a threshold that is NaN, an unknown
            measure, a model without heads, or a layer without relevance that ``ranking`` lacks.

    Example:
        >>> policy = ConfidencePolicy(model, factors=(0.5, 1.0), ranking=scores["michel"])
        >>> policy.fit_accuracy(held_out, lambda batch: batch["labels"], loss=0.01)
        >>> prediction = policy.predict(batch)
        >>> print(prediction.reason(0))
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Sequence[float] = (0.5, 1.0),
        threshold: float = 0.9,
        *,
        measure: str = "probability",
        ranking: HeadScores | None = None,
        forward_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        take: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        ascending = all(a < b for a, b in zip(factors, factors[1:], strict=False))
        if not factors or not ascending or not 0.0 < factors[0] or not factors[-1] < float("inf"):
            raise ValueError(f"factors must be positive and ascending, got {list(factors)}")
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if threshold != threshold:
            raise ValueError("threshold must be a number, got NaN")
        layers = attention_layers(model)
        if not any(layer.num_heads for layer in layers.values()):
            raise ValueError("model must have attention heads: call headwise.convert first")
        for name, layer in layers.items():
            known = None if ranking is None else ranking.values.get(name)
            if known is not None and len(known) != layer.num_heads:
                raise ValueError(
                    f"ranking must have {layer.num_heads} heads for layer '{name}', "
                    f"got {len(known)}"
                )
            if known is None and isinstance(layer.gate, (FixedGate, type(None))):
                raise ValueError(
                    f"layer '{name}' has no relevance of its own: ranking must have scores for it"
                )
        self.model = model
        self.factors = tuple(float(factor) for factor in factors)
        self.threshold = float(threshold)
        self.measure = measure
        self.ranking = ranking
        self._forward = forward_fn or _forward
        self._take = take or _take

    @torch.no_grad()
    def predict(self, batch: Any) -> StagedPrediction:
        """Logits of every input, each at the budget that it took to be sure.

        Raises:
            ValueError: logits that are not ``[B, C]`` or not finite.
        """
        return self._run(batch, stop=True)[0]

    @torch.no_grad()
    def fit(self, batches: Iterable[Any], heads: float) -> float:
        """Sets the threshold to the largest with which inputs run ``heads`` heads on average.

        Heads of all layers and stages are counted, on data that stands for what will come. Returns
        the threshold: infinity where every input may run every stage.

        Raises:
            ValueError: no batches, or fewer heads than the first stage alone runs.
        """
        found = [self._run(batch, stop=False)[0] for batch in batches]
        if not found:
            raise ValueError("batches must not be empty: there is nothing to fit a threshold on")
        confidence = torch.cat([f.confidence[:-1] for f in found], 1).double().cpu()  # [S-1, N]
        cost = torch.cat([f.heads for f in found], 1).double().cpu()  # [S, N]
        self.threshold = _ops.confidence_threshold(confidence, cost, float(heads))
        return self.threshold

    @torch.no_grad()
    def fit_accuracy(
        self,
        batches: Iterable[Any],
        target_fn: Callable[[Any], Tensor] | None = None,
        *,
        loss: float = 0.01,
        certainty: float = 0.5,
    ) -> FittedPolicy:
        """Sets the threshold to the least that loses at most ``loss`` of the accuracy.

        Against the widest stage, on ``batches``. Take data that neither the model nor the ranking
        was fitted on: a model is surer of what it was trained on, and a threshold from there lets
        too many inputs go on.

        Args:
            batches: what the model is run on.
            target_fn: ``batch -> int64 [B]``, its labels; None: what the widest stage predicts, so
                that ``loss`` is the share of predictions that may change.
            loss: the share of inputs, in [0, 1], that may be lost.
            certainty: how sure that must be, in [0.5, 1): the threshold goes down from infinity as
                long as the upper bound of the loss (normal approximation) stays within ``loss``.
                0.5: the mean does.

        Returns:
            The threshold and what it means. Where ``pays`` is False, the widest stage alone is
            cheaper: fewer or narrower stages, or another gate, are needed.

        Raises:
            ValueError: no batches, ``loss`` or ``certainty`` out of range, or targets that are not
                int64 ``[B]``.
        """
        if not 0.5 <= certainty < 1.0:
            raise ValueError(f"certainty must be in [0.5, 1), got {certainty}")
        runs, right = [], []
        for batch in batches:
            run, stages = self._run(batch, stop=False)
            runs.append(run)
            predicted = torch.stack(stages).argmax(2)  # [S, B]
            targets = predicted[-1] if target_fn is None else target_fn(batch)
            if targets.shape != predicted[-1].shape or targets.is_floating_point():
                raise ValueError(
                    f"target_fn must return whole numbers [{len(predicted[-1])}], got "
                    f"{targets.dtype} {list(targets.shape)}"
                )
            right.append((predicted == targets.to(predicted.device)).cpu())
        if not runs:
            raise ValueError("batches must not be empty: there is nothing to fit a threshold on")
        confidence = torch.cat([run.confidence for run in runs], 1).double().cpu()  # [S, N]
        correct = torch.cat(right, 1)  # [S, N]
        heads = torch.cat([run.heads for run in runs], 1).double().cpu()  # [S, N]
        z = statistics.NormalDist().inv_cdf(certainty)
        self.threshold = _ops.accurate_threshold(confidence[:-1], correct, loss, z)
        stage = _ops.stopping_stage(confidence, self.threshold)[None]  # [1, N]
        return FittedPolicy(
            self.threshold,
            heads.cumsum(0).gather(0, stage).mean().item(),
            correct.gather(0, stage).double().mean().item(),
            heads[-1].mean().item(),
            correct[-1].double().mean().item(),
        )

    def _run(self, batch: Any, stop: bool) -> tuple[StagedPrediction, list[Tensor]]:
        """The prediction, and the logits of each stage that ran, of the inputs that it ran."""
        stages: list[Tensor] = []
        logits = stage = confidence = heads = rows = None
        with evaluating(self.model):
            for number, factor in enumerate(self.factors):
                part = batch if rows is None else self._take(batch, rows)
                with _widened(self.model, factor, self.ranking) as counts:
                    found = self._forward(self.model, part)
                _check_logits(found)
                stages.append(found)
                if logits is None:
                    rows = torch.arange(len(found), device=found.device)
                    logits = torch.empty_like(found)
                    stage = torch.zeros_like(rows)
                    shape = (len(self.factors), len(found))
                    confidence = torch.full(shape, float("nan"), device=found.device)
                    heads = torch.zeros(shape, dtype=torch.int64, device=found.device)
                sure = _ops.prediction_confidence(found.float(), self.measure)  # [rows]
                logits[rows], stage[rows] = found, number
                confidence[number, rows] = sure
                heads[number, rows] = sum(counts).to(heads)
                if stop:
                    rows = rows[sure < self.threshold]
                    if len(rows) == 0:
                        break
        return StagedPrediction(logits, stage, confidence, heads, self.threshold), stages


@contextlib.contextmanager
def _widened(model: nn.Module, factor: float, ranking: HeadScores | None) -> Iterator[list[Tensor]]:
    """Gates give ``factor`` times as many heads; yields the counts ``[B]`` of the layers' calls."""
    counts: list[Tensor] = []
    handles, ungated = [], []
    try:
        for name, layer in attention_layers(model).items():
            if layer.gate is None:
                layer.set_gate(FixedGate())
                layer.gate.train(layer.training)
                ungated.append(layer)
            known = None if ranking is None else ranking.values.get(name)

            def widen(gate, inputs, selection, known=known, name=name) -> Selection:
                if factor != 1.0:
                    selection = _widen(selection, factor, known, name)
                counts.append(selection.count)
                return selection

            handles.append(layer.gate.register_forward_hook(widen))
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for layer in ungated:
            layer.set_gate(None)


def _widen(selection: Selection, factor: float, known: Tensor | None, name: str) -> Selection:
    relevance = selection.relevance  # [B, H]
    if relevance is None:
        if known is None:
            raise ValueError(f"layer '{name}' has no relevance: ranking must have scores for it")
        relevance = known.to(selection.weight).expand_as(selection.weight)
    if relevance.size(1) == 0:
        return selection
    index, count, weight = _ops.widen_selection(
        selection.weight, selection.count, relevance, factor
    )
    return selection._replace(index=index, count=count, weight=weight)


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(1) < 2:
        raise ValueError(
            "forward_fn must return logits [B, C] of at least 2 classes, got "
            + (f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else repr(logits))
        )
    if not torch.isfinite(logits).all():
        raise ValueError("forward_fn must return finite logits, got NaN or infinity")


def _forward(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    return getattr(output, "logits", output)


def _take(batch: Any, rows: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)]
    if isinstance(batch, Mapping):
        return {key: _take(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_take(value, rows) for value in batch)
    return batch
