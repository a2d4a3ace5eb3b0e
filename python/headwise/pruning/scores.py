"""Importance: one score per head over a data set, to decide which heads stay.

Which one should you use? ``michel`` measures how sensitive the loss is to a head and is the usual
choice; ``hies`` adds how focused a head's attention is, and is worth trying if more than a tenth of
the heads are pruned; ``entropy`` and ``attention_confidence`` need no loss but say little
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.convert.conversion import converted
from headwise.io.display import Grid, Shown, per_head
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.batches import check_batches
from headwise.nn.instrumenting import instrument

__all__ = ["HeadScores", "hies", "score_heads"]

METRICS = ("michel", "entropy", "attention_confidence", "hies")


@dataclass(frozen=True)
class HeadScores(Shown):
    """One score per head, layer by layer.

    Attributes:
        metric: what the scores measure.
        values: layer name -> float64 ``[H]``; layers may have different numbers of heads.

    Raises:
        TypeError: ``values`` is not a mapping from names to numbers.
        ValueError: a layer's scores are not a vector.
    """

    metric: str
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise TypeError(
                f"values must map layer names to scores, got {type(self.values).__name__}"
            )
        values = {}
        for name, given in self.values.items():
            if not isinstance(name, str):
                raise TypeError(f"values must have layer names as keys, got {quoted(name)}")
            try:
                if isinstance(given, Tensor) and given.is_complex():
                    raise TypeError
                scores = torch.as_tensor(given, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"values of {layer_called(name)} must be real numbers, got {quoted(given)}"
                ) from None
            values[name] = scores.detach().cpu()
        for name, scores in values.items():
            if scores.dim() != 1:
                raise ValueError(
                    f"values of {layer_called(name)} must be one score per head, got shape "
                    f"{tuple(scores.shape)}"
                )
        object.__setattr__(self, "values", values)

    @property
    def sign(self) -> float:
        """1.0 if the largest scores are the most important, -1.0 if the smallest are."""
        return -1.0 if self.metric == "entropy" else 1.0

    @property
    def core(self) -> _C.HeadScores:
        """The same scores as an object of the C++ core."""
        return _C.HeadScores(
            self.metric, list(self.values), [scores.tolist() for scores in self.values.values()]
        )

    @staticmethod
    def from_core(core: _C.HeadScores) -> HeadScores:
        values: dict[str, Any] = dict(zip(core.layers, core.values, strict=True))
        return HeadScores(core.metric, values)

    def ranking(self) -> list[tuple[str, int]]:
        """(layer, head) pairs, highest score first; ties go to the earlier layer, lower head."""
        pairs = [(name, head) for name, s in self.values.items() for head in range(len(s))]
        return sorted(pairs, key=lambda pair: -self.values[pair[0]][pair[1]].item())

    def _records(self) -> list[dict[str, Any]]:
        return per_head(self.values, "score")

    def _grid(self) -> Grid:
        values = {name: scores.tolist() for name, scores in self.values.items()}
        return Grid.of_heads(f"{self.metric}: score of every head", values)

    def to_json(self) -> str:
        return self.core.to_json()

    @staticmethod
    def from_json(text: str) -> HeadScores:
        """Raises ValueError: naming what is missing, unknown or of the wrong kind."""
        return HeadScores.from_core(_C.HeadScores.from_json(text))

    def save(self, path: str | Path) -> None:
        """Writes JSON atomically."""
        from headwise.io.files import write_atomic

        write_atomic(path, self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> HeadScores:
        """Of a file that :meth:`save` wrote.

        Raises:
            TypeError, OSError: ``path`` is not a file that can be read.
            ValueError: the file holds something else.
        """
        from headwise.io.files import read_text

        return HeadScores.from_json(read_text(path))


def hies(
    importance: HeadScores, entropy: HeadScores, alpha: float = 0.5, scope: str = "model"
) -> HeadScores:
    """``alpha * importance + (1 - alpha) * (1 - entropy)``, both min-max scaled first.

    Head importance and entropy score, arXiv 2510.13832.

    Args:
        importance: per-example importance (``score_heads(..., absolute="per_example")``).
        entropy: normalised attention entropy.
        alpha: in [0, 1]; the paper tunes it on held-out data.
        scope: scale over each ``"layer"`` or over all layers (``"model"``).

    Raises:
        ValueError: alpha or scope out of range, or the two do not have the same layers.
    """
    return HeadScores.from_core(_C.hies(importance.core, entropy.core, alpha, scope))


def score_heads(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    metrics: Sequence[str] = ("michel",),
    *,
    absolute: str = "per_token",
    normalize: bool = True,
    alpha: float = 0.5,
    scope: str = "model",
    progress: bool | None = None,
) -> dict[str, HeadScores]:
    """Scores every head of ``model`` by all ``metrics``, in one pass over ``batches``.

    - ``michel`` (Michel et al. 2019, eq. 2): I_h = E |<context_h, dL/dcontext_h>|, how sensitive
      the loss is to head h; each layer divided by its L2 norm (``normalize``).
    - ``entropy``: mean over query rows of the row's entropy / ln(keys it can see), in [0, 1].
    - ``attention_confidence`` (Voita et al. 2019): mean of each row's largest
      attention probability.
    - ``hies`` (arXiv 2510.13832): per-example importance and entropy together; see :func:`hies`.

    The model runs in eval mode; its modes, gradients and parameters are restored. A model that has
    not been converted is scored through a converted copy, with the names that
    :func:`headwise.convert` would give. Padding that a layer knows about is left out.

    Args:
        model: a converted or convertible model.
        batches: input of ``loss_fn``.
        loss_fn: ``(model, batch) -> loss``: one loss per example ``[B]``, or their mean. A mean is
            multiplied by the batch size, so that scores do not depend on how data is batched.
        metrics: of "michel", "entropy", "attention_confidence", "hies".
        absolute: the level at which ``michel`` takes the absolute value: "per_token", "per_example"
            or "per_batch" (which depends on the batch size; for comparison only).
        normalize: divide each layer's ``michel`` by its L2 norm. ``hies`` does its own scaling.
        alpha: the share of importance in ``hies``.
        scope: the heads over which ``hies`` scales: "layer" or "model".
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        metric -> scores, in the order of ``metrics``.

    Raises:
        TypeError: ``model``, ``batches`` or a metric is something else.
        ValueError: an unknown metric or option, no batches, a loss that is NaN, infinite or of the
            wrong shape, or one that does not depend on the heads.
    """
    if isinstance(metrics, str):
        raise ValueError(
            f"metrics must be a list of some of {', '.join(METRICS)}, got {quoted(metrics)}"
        )
    for metric in metrics:
        if not isinstance(metric, str):
            raise TypeError(
                f"metrics must be names, of {', '.join(METRICS)}, got {quoted(metric)}; your own "
                f"score is a headwise.HeadScores, which needs no score_heads"
            )
    check_batches(batches)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("score_heads needs gradients: call it outside of torch.inference_mode")
    scorer = _C.HeadScorer(list(metrics), absolute, normalize, alpha, scope)

    def see(name: str, layer: AttentionLayer, probe: AttentionProbe) -> None:
        scorer.see(
            name,
            probe.q.detach(),
            probe.k.detach(),
            probe.context,
            probe.key_padding_mask,
            probe.attn_mask,
            probe.is_causal,
            probe.query_padding_mask,
            layer._added_keys,
        )

    with instrument(converted(model)) as opened:
        opened.probe(see)
        for batch in with_progress(batches, "scoring heads", "batch", progress):
            with torch.set_grad_enabled(scorer.needs_gradients):
                loss = loss_fn(opened.model, batch)
                scorer.add(loss if isinstance(loss, Tensor) else None)
    found = scorer.scores()
    return {metric: HeadScores.from_core(found[metric]) for metric in metrics}
