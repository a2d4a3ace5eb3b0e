"""A head budget that follows the confidence of the prediction: stop early, or widen and run again.

Contextual adaptation as a policy over any gate: every input first runs a few of the heads that its
gates rank highest; if the prediction is not confident enough, it runs again with more of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.gates import FixedGate
from headwise.gates.selection import Selection
from headwise.io.printable import layer_called
from headwise.nn.batches import batch_list, run_model, take_rows
from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers
from headwise.pruning.scores import HeadScores

__all__ = ["ConfidencePolicy", "FittedPolicy", "StagedPrediction"]

_ops = torch.ops.headwise


StagedPrediction, FittedPolicy = _C.StagedPrediction, _C.FittedPolicy
for _made in (StagedPrediction, FittedPolicy):
    _made.__module__ = __name__


class ConfidencePolicy:
    """Runs a model on a small head budget, and on wider ones if it is not confident.

    Stage s multiplies the number of heads that each gate gives an input by ``factors[s]`` (rounded,
    half up; at least one head if the gate gave any, at most all). The heads are chosen by the
    gate's own relevance; for a gate without relevance (:class:`FixedGate`, or no gate, which means
    all heads) by ``ranking``. Heads that the gate chose keep their weight; added ones have weight
    one. A later stage runs the model again: the cost of an input is the sum of its stages.

    Args:
        model: a converted classifier; it is not changed.
        factors: of the budget, ascending; 1 is the gates' own choice.
        threshold: an input whose confidence reaches it stops.
        measure: of confidence: "probability" (the largest), "margin" (to the second), or "entropy"
            (1 - entropy / ln C).
        ranking: importance of heads, for layers whose gates have no relevance.
        forward_fn: ``(model, batch) -> logits [B, C]``; default: ``model(**batch)`` for mappings,
            ``model(*batch)`` for tuples and lists, else ``model(batch)``; its ``logits`` if the
            result has them.
        take: ``(batch, rows) -> batch`` with only those rows (int64); default: of every tensor in a
            mapping, tuple or list, or of the tensor. Rows are on the CPU.

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
        self._stages = _C.ConfidenceStages(list(factors), threshold, measure)
        layers = attention_layers(model)
        if not any(layer.num_heads for layer in layers.values()):
            raise ValueError("model must have attention heads: call headwise.convert first")
        for name, layer in layers.items():
            known = None if ranking is None else ranking.values.get(name)
            if known is not None and len(known) != layer.num_heads:
                raise ValueError(
                    f"ranking must have {layer.num_heads} heads for {layer_called(name)}, "
                    f"got {len(known)}"
                )
            if known is None and isinstance(layer.gate, (FixedGate, type(None))):
                raise ValueError(
                    f"{layer_called(name)} has no relevance of its own: ranking must have scores "
                    "for it"
                )
        self.model = model
        self.ranking = ranking
        self._forward_fn = forward_fn or run_model
        self._take = take or take_rows

    @property
    def factors(self) -> list[float]:
        """The factor of the budget of each stage, ascending."""
        return self._stages.factors

    @property
    def measure(self) -> str:
        """Of confidence."""
        return self._stages.measure

    @property
    def threshold(self) -> float:
        """An input whose confidence reaches it stops."""
        return self._stages.threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._stages.threshold = threshold

    def predict(self, batch: Any) -> _C.StagedPrediction:
        """Logits of every input, each at the budget at which it was confident enough.

        Raises:
            ValueError: logits that are not ``[B, C]`` or not finite.
        """
        with self._opened() as runs_of:
            return self._stages.predict(runs_of(batch))

    def fit(self, batches: Iterable[Any], heads: float) -> float:
        """Sets the threshold to the largest at which inputs run ``heads`` heads on average.

        Heads of all layers and stages are counted, on data that represents future inputs. Returns
        the threshold: infinity if every input may run every stage.

        Raises:
            ValueError: no batches, or fewer heads than the first stage alone runs.
        """
        with self._opened() as runs_of:
            return self._stages.fit([runs_of(batch) for batch in batches], float(heads))

    def fit_accuracy(
        self,
        batches: Iterable[Any],
        labels_fn: Callable[[Any], Tensor] | None = None,
        *,
        loss: float = 0.01,
        certainty: float | None = None,
    ) -> _C.FittedPolicy:
        """Sets the threshold to the smallest that loses at most ``loss`` of the accuracy.

        Relative to the widest stage, on ``batches``. Use data that neither the model nor the
        ranking was fitted on: a model is more confident on its training data, and a threshold from
        there lets too many inputs continue.

        Args:
            batches: inputs of the model.
            labels_fn: ``batch -> int64 [B]``, its labels; None: the predictions of the widest
                stage, so that ``loss`` is the share of predictions that may change.
            loss: the share of inputs, in [0, 1], that may be lost.
            certainty: in (0, 1): the probability, over the draw of ``batches``, with which at most
                the share ``loss`` of all inputs is lost (right at the widest stage, wrong at the
                stage where the policy stops), and so at most that much accuracy. By learn then test
                (Angelopoulos et al., arXiv 2110.01052; CALM, arXiv 2207.07061): a fixed sequence of
                thresholds, each tested with an exact binomial. Needs at least ln(1 - certainty) /
                ln(1 - loss) examples, 299 for 0.95 and 0.01: with fewer, every input runs every
                stage. None: the accuracy lost on ``batches`` is at most ``loss``, without a bound
                for other data.

        Returns:
            The threshold and its consequences. If ``pays`` is False, the widest stage alone is
            cheaper: fewer or narrower stages, or another gate, are needed.

        Raises:
            ValueError: no batches, ``loss`` or ``certainty`` out of range, or labels that are not
                int64 ``[B]``.
        """
        batches = batch_list(batches)
        labels = [None if labels_fn is None else labels_fn(batch) for batch in batches]
        with self._opened() as runs_of:
            runs = [runs_of(batch) for batch in batches]
            return self._stages.fit_accuracy(runs, labels, loss, certainty)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Callable[[Any], Callable]]:
        """Opens the model; yields a function from a batch to a function that runs the model on its
        rows.

        The latter takes rows int64 ``[N]`` (None: all) and the factor of a stage, and returns
        logits ``[N, C]`` and how many heads ran ``[N]``.
        """
        factor = 1.0
        counts: list[Tensor] = []  # [N] of each call of a layer

        def widen(name: str, x: Tensor, choose: Callable[[], Selection]) -> Selection:
            selection = choose()
            if factor != 1.0:
                known = None if self.ranking is None else self.ranking.values.get(name)
                selection = _widen(selection, factor, known, name)
            counts.append(selection.count)
            return selection

        def run(batch: Any, rows: Tensor | None, wanted: float) -> tuple[Tensor, Tensor]:
            nonlocal factor
            factor = wanted
            counts.clear()
            if rows is not None:
                batch = self._take(batch, rows)
            logits = self._forward_fn(self.model, batch)
            if not isinstance(logits, Tensor):
                raise ValueError(
                    "forward_fn must return logits [B, C] of at least 2 classes, got "
                    f"{type(logits).__name__}"
                )
            if not counts:
                raise ValueError("forward_fn must run model: no attention layer was called")
            return logits, torch.stack(counts).sum(0, dtype=counts[0].dtype)

        with torch.no_grad(), instrument(self.model) as opened:
            opened.override(widen)
            yield lambda batch: functools.partial(run, batch)


def _widen(selection: Selection, factor: float, known: Tensor | None, name: str) -> Selection:
    relevance = selection.relevance  # [B, H]
    if relevance is None:
        if known is None:
            raise ValueError(
                f"{layer_called(name)} has no relevance: ranking must have scores for it"
            )
        relevance = known.to(selection.weight).expand_as(selection.weight)
    if relevance.size(1) == 0:
        return selection
    index, count, weight = _ops.widen_selection(
        selection.weight, selection.count, relevance, factor
    )
    return selection._replace(index=index, count=count, weight=weight)
