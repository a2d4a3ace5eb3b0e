"""How far the model's predictions move if a head is turned down: scores without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.convert.conversion import converted
from headwise.gates.selection import Selection
from headwise.io.checked import check_number
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.nn.batches import check_batches, run_model
from headwise.nn.instrumenting import instrument
from headwise.pruning.scores import HeadScores

__all__ = ["divergence_scores"]


def divergence_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    weight: float = 0.5,
    progress: bool | None = None,
) -> HeadScores:
    r"""How much each head brings the model's predictions back to those of all heads: scores for
    :func:`headwise.plan`, without labels.

    Every head of the model is given the same ``weight`` m < 1, and a head's importance for an input
    x is how fast the predictions return to those of the whole model as its weight grows:

    .. math:: I_h(x) = - \frac{\partial}{\partial m_h} KL(p_1(x) \,\|\, p_m(x)) \Big|_{m_h = m},
        \qquad score_h = \frac1N \sum_x \frac{I_h(x)}{\sum_i |I_i(x)|}

    The gradient is taken at m < 1, inside the cube that pruning moves through: at m = 1 it is 0 for
    every head, and Michel's gradient of the loss (arXiv 1905.10650) is taken there. Each input
    counts the same. Heads that move the predictions away have negative scores. Ours.

    Args:
        model: a converted or convertible model, unchanged. With gates: importance in addition to
            the heads that they choose.
        batches: calibration data, no labels needed: 512 texts suit half of the heads of
            MiniLM, and an eighth needs thousands.
        forward_fn: ``(model, batch) -> logits`` ``[B, ..., C]``; default: the model called with the
            batch, a mapping's items as keyword arguments, and the ``logits`` of what it returns.
            With more than two dimensions (tokens), the divergences of an input's are averaged;
            leave padding out in ``forward_fn``.
        weight: m, in (0, 1).
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        Scores of the metric ``"divergence"``.

    Raises:
        ValueError: no batches, ``weight`` out of range, logits that are not floating ``[B, ...,
            C]`` or not finite, or that do not depend on the heads.
    """
    forward = run_model if forward_fn is None else forward_fn
    check_batches(batches)
    model = converted(model)
    total: dict[str, Tensor] = {}
    count = 0
    for batch in with_progress(batches, "scoring heads", "batch", progress):
        shares = importance_shares(model, batch, forward, weight)
        count += len(next(iter(shares.values())))
        for name, share in shares.items():
            own = share.sum(0)  # [H]
            total[name] = total[name] + own if name in total else own
    if not count:
        raise ValueError("batches must not be empty: there is nothing to score heads on")
    return HeadScores("divergence", {name: own / count for name, own in total.items()})


def importance_shares(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Tensor], weight: float
) -> dict[str, Tensor]:
    """Layer name -> ``[B, H]``: :func:`divergence_scores` of each input; float64, on the CPU."""
    check_number("weight", weight)
    if not 0.0 < weight < 1.0:
        raise ValueError(f"weight must be in (0, 1), got {quoted(weight)}")
    importance = _importance(model, batch, forward, weight)
    size = torch.stack([own.abs().sum(1) for own in importance.values()]).sum(0)  # [B]
    if not bool(size.isfinite().all()):
        raise ValueError("forward_fn must return finite logits, got NaN or infinity")
    return {name: torch.where(size > 0, own.T / size, 0.0).T for name, own in importance.items()}


def _importance(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Tensor], weight: float
) -> dict[str, Tensor]:
    """Layer name -> I ``[B, H]``, float64, on the CPU."""
    with instrument(model) as opened, torch.no_grad():
        whole = _log_probabilities(forward(opened.model, batch))
    scales: dict[str, Tensor] = {}

    def scaled(name: str, x: Tensor, choose: Callable[[], Selection]) -> Selection:
        selection = choose()
        if name not in scales:
            own = torch.full_like(selection.weight, weight, dtype=torch.float32)
            scales[name] = own.requires_grad_()
        return selection._replace(weight=selection.weight * scales[name].to(x.dtype))

    with instrument(model) as opened, torch.enable_grad():
        opened.override(scaled)
        moved = _log_probabilities(forward(opened.model, batch))
        divergence = F.kl_div(moved, whole, reduction="none", log_target=True).sum(-1)
        if not scales or not divergence.requires_grad:
            raise ValueError("forward_fn must return logits that depend on the model's heads")
        each = divergence.flatten(1).mean(1) if divergence.dim() > 1 else divergence  # [B]
        names = [name for name in opened.layers if name in scales]
        found = torch.autograd.grad(
            each.sum(), [scales[name] for name in names], materialize_grads=True
        )
    sizes = {name: len(one) for name, one in zip(names, found, strict=True)}
    for name, size in sizes.items():
        if size != len(whole):
            raise ValueError(
                f"forward_fn must return one row of logits per sequence of each layer: got "
                f"{len(whole)} rows, and a batch of {size} in {layer_called(name)}"
            )
    return {name: -one.double().cpu() for name, one in zip(names, found, strict=True)}


def _log_probabilities(logits: Any) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise ValueError(
            "forward_fn must return logits [B, ..., C], got "
            + (
                f"{logits.dtype} {list(logits.shape)}"
                if isinstance(logits, Tensor)
                else type(logits).__name__
            )
        )
    return F.log_softmax(logits.double(), -1)
