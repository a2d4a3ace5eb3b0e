"""Importance: a score a head over a data set, for deciding which heads stay.

Which one should you use? ``michel`` asks how much the loss would feel a head and is the usual
choice; ``hies`` adds how focused a head's attention is, and is worth trying where more than a tenth
of the heads go; ``entropy`` and ``confidence`` need no loss to make sense but say little alone.
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
from headwise.nn.intervention import probing, with_progress
from headwise.nn.multihead_attention import AttentionProbe, MultiheadAttention

__all__ = ["HeadScores", "hies", "score_heads"]

METRICS = ("michel", "entropy", "confidence", "hies")


@dataclass(frozen=True)
class HeadScores:
    """A score a head, layer by layer.

    Attributes:
        metric: what the scores measure.
        values: layer name -> float64 ``[H]``; layers may have different numbers of heads.

    Raises:
        TypeError: ``values`` is not a mapping from names to vectors.
    """

    metric: str
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise TypeError(
                f"values must map layer names to scores, got {type(self.values).__name__}"
            )
        values = {
            name: torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
            for name, scores in self.values.items()
        }
        for name, scores in values.items():
            if scores.dim() != 1:
                raise ValueError(
                    f"values of layer '{name}' must be one score a head, got shape "
                    f"{tuple(scores.shape)}"
                )
        object.__setattr__(self, "values", values)

    @property
    def core(self) -> _C.HeadScores:
        """The same scores as the C++ core holds them."""
        return _C.HeadScores(
            self.metric, list(self.values), [scores.tolist() for scores in self.values.values()]
        )

    @staticmethod
    def from_core(core: _C.HeadScores) -> HeadScores:
        return HeadScores(core.metric, dict(zip(core.layers, core.values, strict=True)))

    def ranking(self) -> list[tuple[str, int]]:
        """(layer, head) pairs, highest score first; ties go to the earlier layer, lower head."""
        pairs = [(name, head) for name, s in self.values.items() for head in range(len(s))]
        return sorted(pairs, key=lambda pair: -self.values[pair[0]][pair[1]].item())

    def to_json(self) -> str:
        return self.core.to_json()

    @staticmethod
    def from_json(text: str) -> HeadScores:
        """Raises ValueError: naming what is missing, unknown or of the wrong kind."""
        return HeadScores.from_core(_C.HeadScores.from_json(text))

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all."""
        from headwise.io.files import write_atomic

        write_atomic(path, self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> HeadScores:
        return HeadScores.from_json(Path(path).read_text(encoding="utf-8"))


def hies(
    importance: HeadScores, entropy: HeadScores, alpha: float = 0.5, scope: str = "global"
) -> HeadScores:
    """``alpha * importance + (1 - alpha) * (1 - entropy)``, both min-max scaled first.

    Head importance and entropy score, arXiv 2510.13832.

    Args:
        importance: per-example importance (``score_heads(..., absolute="per_example")``).
        entropy: normalised attention entropy.
        alpha: in [0, 1]; the paper tunes it on held-out data.
        scope: scale over each ``"layer"`` or over all layers (``"global"``).

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
    scope: str = "global",
    progress: bool | None = None,
) -> dict[str, HeadScores]:
    """Scores every head of ``model`` by all ``metrics``, in one pass over ``batches``.

    - ``michel`` (Michel et al. 2019, eq. 2): I_h = E |<context_h, dL/dcontext_h>|, how much the
      loss would feel head h; each layer divided by its L2 norm (``normalize``).
    - ``entropy``: mean over query rows of the row's entropy / ln(keys it can see), in [0, 1].
    - ``confidence`` (Voita et al. 2019): mean of each row's largest attention probability.
    - ``hies`` (arXiv 2510.13832): per-example importance and entropy together; see :func:`hies`.

    The model runs in eval mode; its modes, gradients and parameters are afterwards as before. A
    model that has not been converted is scored through a converted copy, under the names that
    :func:`headwise.convert` would give. Padding, where a layer is told of it, is left out.

    Args:
        model: a converted or convertible model.
        batches: whatever ``loss_fn`` takes.
        loss_fn: ``(model, batch) -> loss``: one loss an example ``[B]``, or their mean. A mean is
            multiplied by the batch size, so that scores do not depend on how data is batched.
        metrics: of "michel", "entropy", "confidence", "hies".
        absolute: where ``michel`` takes the absolute value: "per_token", "per_example" or
            "per_batch" (which depends on the batch size; for comparison only).
        normalize: divide each layer's ``michel`` by its L2 norm. ``hies`` scales for itself.
        alpha: the share of importance in ``hies``.
        scope: over what ``hies`` scales: "layer" or "global".
        progress: a progress bar on stderr; None: where that is a terminal.

    Returns:
        metric -> scores, in the order of ``metrics``.

    Raises:
        ValueError: an unknown metric or option, no batches, a loss that is NaN, infinite or of the
            wrong shape, or one that does not depend on the heads.
    """
    _check(metrics, absolute, alpha, scope)
    model = converted(model)
    recorder = _Recorder(
        gradients=bool({"michel", "hies"} & set(metrics)),
        statistics=bool({"entropy", "confidence", "hies"} & set(metrics)),
    )
    count = 0
    with probing(model, recorder):
        for batch in with_progress(batches, "scoring heads", "batch", progress):
            recorder.run(model, batch, loss_fn)
            count += 1
    if count == 0:
        raise ValueError("batches must not be empty: there is nothing to score heads on")

    core = recorder.accumulator
    made: dict[str, HeadScores] = {}
    for metric in metrics:
        if metric == "michel":
            made[metric] = HeadScores.from_core(core.michel(absolute, normalize))
        elif metric == "hies":
            importance = core.michel("per_example", normalize)
            made[metric] = HeadScores.from_core(_C.hies(importance, core.entropy(), alpha, scope))
        else:
            made[metric] = HeadScores.from_core(getattr(core, metric)())
    return made


def _check(metrics: Sequence[str], absolute: str, alpha: float, scope: str) -> None:
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be a list of some of {', '.join(METRICS)}, got {metrics!r}")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {metric!r}")
    if absolute not in ("per_token", "per_example", "per_batch"):
        raise ValueError(
            f"absolute must be 'per_token', 'per_example' or 'per_batch', got {absolute!r}"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")


class _Recorder:
    """Receives what each layer computed in a batch, and hands it to the C++ accumulator."""

    def __init__(self, gradients: bool, statistics: bool) -> None:
        self.accumulator = _C.HeadScoreAccumulator()
        self.names: dict[int, str] = {}
        self._gradients = gradients
        self._statistics = statistics
        self._calls: list[tuple[str, Tensor, Tensor | None]] = []  # of the batch under way

    def __call__(self, layer: MultiheadAttention, probe: AttentionProbe) -> None:
        name = self.names[id(layer)]
        padding = _query_padding(probe)  # [B, L]
        if self._gradients:
            context = probe.context  # [B, H, L, d]
            if not context.requires_grad:  # a frozen model: the gradient starts here
                context.requires_grad_()
            self._calls.append((name, context, padding))
        if self._statistics:
            with torch.no_grad():
                entropy, confidence = torch.ops.headwise.attention_statistics(
                    probe.q.detach(),
                    probe.k.detach(),
                    _with_added_keys(probe.key_padding_mask, probe.k.size(2)),
                    padding,
                    _with_added_keys(probe.attn_mask, probe.k.size(2)),
                    probe.is_causal,
                )  # [B, H] each
            self.accumulator.add_statistics(name, entropy, confidence)

    def run(self, model: nn.Module, batch: Any, loss_fn: Callable) -> None:
        self._calls.clear()
        with torch.set_grad_enabled(self._gradients):
            loss = loss_fn(model, batch)
        if not self._gradients:
            return
        if not isinstance(loss, Tensor) or loss.dim() > 1 or not loss.is_floating_point():
            raise ValueError(
                "loss_fn must return a floating tensor, one loss an example [B] or their mean, got "
                + (f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss))
            )
        if not self._calls:
            raise ValueError("loss_fn must run model: none of its attention layers was called")
        if not torch.isfinite(loss).all():
            raise ValueError("loss_fn must return a finite loss, got NaN or infinity")
        contexts = [context for _, context, _ in self._calls]
        if not loss.requires_grad:
            raise ValueError("loss_fn must return a loss that depends on model's output")
        total = loss.sum() if loss.dim() == 1 else loss * contexts[0].size(0)
        gradients = torch.autograd.grad(total, contexts, allow_unused=True)
        for (name, context, padding), gradient in zip(self._calls, gradients, strict=True):
            gradient = torch.zeros_like(context) if gradient is None else gradient
            self.accumulator.add_gradient(name, context.detach(), gradient, padding)
        self._calls.clear()


def _query_padding(probe: AttentionProbe) -> Tensor | None:
    """bool [B, L], True = padding; None where nothing is known about the queries."""
    mask = probe.query_padding_mask
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask == float("-inf")


def _with_added_keys(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask over the given keys, extended by the rows a layer adds, which are always visible."""
    if mask is None or mask.size(-1) in (1, keys):
        return mask
    return torch.nn.functional.pad(mask, (0, keys - mask.size(-1)))
