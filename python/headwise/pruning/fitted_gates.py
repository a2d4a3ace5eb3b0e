"""Gates that are fitted to a frozen model instead of trained with it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.hard_concrete import HardConcreteGate
from headwise.gates.selection import Selection
from headwise.io.checked import check_number
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.batches import batch_list, run_model
from headwise.nn.instrumenting import instrument, without_gates
from headwise.nn.layers import attention_layers
from headwise.pruning.divergence import importance_shares
from headwise.pruning.reconstruction import HELD_OUT, LayerRepair, repair

__all__ = ["GateFit", "fit_gates"]

_ops = torch.ops.headwise

#: Ridges that are tried: shares of the number of inputs, for standardised features.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

#: Standard deviation of the fitted ``log_alpha``: decided, and still trainable.
_SPREAD = 2.0

#: Rounds of setting the threshold: what a layer sees depends on what earlier layers run; and the
#: distance from the wanted share that ends them.
_ROUNDS, _CLOSE = 6, 1e-3


@dataclass(frozen=True)
class GateFit:
    """What :func:`fit_gates` did.

    Attributes:
        share: the mean share of the model's heads that the calibration inputs run.
        ridge: of the regression, the best on held-out inputs.
        explained: layer name -> the share of the variance of its heads' importance, between
            inputs, that its gate predicts for held-out ones; 0: importance does not follow from the
            layer's input, and a static plan does as well there.
        repairs: of :func:`headwise.repair`; empty if ``repaired=False``.
    """

    share: float
    ridge: float
    explained: dict[str, float]
    repairs: list[LayerRepair]


def fit_gates(
    model: nn.Module,
    batches: Iterable[Any],
    keep: float,
    *,
    forward_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    weight: float = 0.5,
    ridges: Sequence[float] = RIDGES,
    repaired: bool = True,
    progress: bool | None = None,
) -> GateFit:
    r"""Fits the gates of ``model`` to the heads that matter to each input, without labels or steps.

    1. For every calibration input, the importance of every head to the frozen model with all heads:
       the shares of :func:`headwise.pruning.divergence_scores`.
    2. Each layer's gate learns to predict them from its own input, by ridge regression:
       :math:`\log\alpha = base + W z / \sqrt D`, z the standardised mean of the tokens.
    3. One threshold for the whole model makes the inputs run the share ``keep`` of its heads on
       average. Inputs and layers differ.
    4. The output projections are repaired for the heads that now run (:func:`headwise.repair`), and
       the threshold is set again.

    Gates trained with the weights tend to become static (routing absorption, arXiv 2603.02227);
    supervised ones with a frozen model are the first stage of Polar Sparsity (2505.14884) and
    SkipGPT (2506.04179), whose labels are output norms and the task's loss. Train the weights
    afterwards with frozen gates (``requires_grad_(False)``).

    Args:
        model: a converted model, changed in place. Every layer's gate is a ``HardConcreteGate(
            input_dependent=True)``; with ``kept_weight="one"`` heads that run are not scaled, and
            with ``hard_from=0`` later training runs the chosen heads from its first step.
        batches: calibration data, no labels needed: some thousand inputs. All are kept in memory.
        keep: the mean share of the heads to run, in (0, 1).
        forward_fn: ``(model, batch) -> logits`` ``[B, ..., C]``, as in
            :func:`headwise.pruning.divergence_scores`.
        weight: of all heads while importance is measured, in (0, 1).
        ridges: to try, as shares of the number of inputs; held-out inputs choose.
        repaired: repair the output projections.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no batches or fewer than four inputs, ``keep`` or ``weight`` out of range, a
            layer without such a gate or that runs more than once, or logits that are not finite or
            do not depend on the heads. The gates and weights of ``model`` are then as they were.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to fit gates to")
    check_number("keep", keep)
    if not 0.0 < keep < 1.0:
        raise ValueError(f"keep must be in (0, 1), got {quoted(keep)}")
    if not ridges or not all(ridge > 0.0 for ridge in ridges):
        raise ValueError(f"ridges must be positive, at least one, got {quoted(list(ridges))}")
    forward = run_model if forward_fn is None else forward_fn
    layers = attention_layers(model)
    gates = {name: _checked(name, layer) for name, layer in layers.items()}
    if not gates:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention: "
            f"call headwise.convert first"
        )
    features: dict[str, list[Tensor]] = {name: [] for name in gates}
    importance: dict[str, list[Tensor]] = {name: [] for name in gates}
    with without_gates(model):
        for batch in with_progress(batches, "fitting gates", "batch", progress):
            for name, own in _features(model, batch, forward).items():
                features[name].append(own)
            for name, own in importance_shares(model, batch, forward, weight).items():
                importance[name].append(own)
        dense = copy.deepcopy(model) if repaired else None
    with _kept(model, gates, dense):
        fit = _regress(features, importance, gates, ridges)
        share = _set_threshold(model, batches, forward, gates, keep)
        repairs: list[LayerRepair] = []
        if dense is not None:
            repairs = repair(
                model, batches, dense, forward_fn=forward, progress=progress, verify=True
            )
            share = _set_threshold(model, batches, forward, gates, keep)
    return GateFit(share, *fit, repairs)


def _checked(name: str, layer: AttentionLayer) -> HardConcreteGate:
    gate = layer.gate
    if not isinstance(gate, HardConcreteGate) or not gate.input_dependent:
        has = "no gate" if gate is None else f"a {type(gate).__name__}"
        if isinstance(gate, HardConcreteGate):
            has = "a static one"
        raise ValueError(
            f"{layer_called(name)} must have a HardConcreteGate(input_dependent=True), got {has}"
        )
    return gate


@contextlib.contextmanager
def _kept(
    model: nn.Module, gates: dict[str, HardConcreteGate], dense: nn.Module | None
) -> Iterator[None]:
    """Restores, after an error, the gates, and the weights if ``dense`` has them."""
    before = {name: copy.deepcopy(gate.state_dict()) for name, gate in gates.items()}
    try:
        yield
    except BaseException:
        if dense is not None:
            model.load_state_dict(dense.state_dict(), strict=False)
        for name, gate in gates.items():
            gate.load_state_dict(before[name])
        raise


def _features(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Layer name -> ``[B, D]``: what its gate would see in the model with all heads."""
    found: dict[str, Tensor] = {}

    def see(name: str, layer: Any, selection: Any, x: Tensor, padding: Tensor | None) -> None:
        if name in found:
            raise ValueError(f"{layer_called(name)} runs more than once: its gate sees two inputs")
        found[name] = _ops.gate_features(x, padding).double().cpu()

    def every_head(name: str, x: Tensor, choose: Callable[[], Selection]) -> Selection:
        return choose()

    with instrument(model) as opened, torch.no_grad():
        opened.override(every_head)
        opened.observe(see)
        forward(opened.model, batch)
    return found


@torch.no_grad()
def _regress(
    features: dict[str, list[Tensor]],
    importance: dict[str, list[Tensor]],
    gates: dict[str, HardConcreteGate],
    ridges: Sequence[float],
) -> tuple[float, dict[str, float]]:
    """Sets ``log_alpha``, the matrices and the statistics of the gates; returns the ridge and what
    is explained."""
    missing = [name for name in gates if not features[name]]
    if missing:
        raise ValueError(f"forward_fn must run {layer_called(missing[0])}, and it does not")
    inputs = {name: torch.cat(parts) for name, parts in features.items()}  # [N, D]
    targets = {name: torch.cat(importance[name]) for name in gates}  # [N, H]
    count = len(next(iter(inputs.values())))
    if count < HELD_OUT:
        raise ValueError(f"batches must have at least {HELD_OUT} inputs, got {count}")
    held = torch.arange(count) % HELD_OUT == HELD_OUT - 1
    standardised = {}
    for name, gate in gates.items():
        mean, variance = inputs[name].mean(0), inputs[name].var(0, unbiased=False)
        gate.feature_mean.copy_(mean)
        gate.feature_variance.copy_(variance)
        gate.feature_batches.fill_(len(features[name]))
        standardised[name] = _ops.standardize(
            inputs[name], gate.feature_mean.double().cpu(), gate.feature_variance.double().cpu()
        )
    left = {
        ridge: {name: _left(standardised[name], targets[name], held, ridge) for name in gates}
        for ridge in ridges
    }
    spread = {
        name: float((targets[name][held] - targets[name][~held].mean(0)).square().sum())
        for name in gates
    }
    ridge = min(ridges, key=lambda ridge: sum(left[ridge].values()))
    solutions = {name: _solve(standardised[name], targets[name], ridge) for name in gates}
    scores = torch.cat(
        [standardised[n] @ matrix + base for n, (base, matrix) in solutions.items()], dim=1
    )
    factor = _SPREAD / max(float(scores.std()), 1e-30)
    for name, gate in gates.items():
        base, matrix = solutions[name]
        gate.anneal(1.0)
        gate.start_from(base * factor, 1.0)
        width = math.sqrt(gate.embed_dim)
        gate.relevance.weight.copy_((matrix.T * factor * width).to(gate.relevance.weight))
    explained = {
        name: 1.0 - left[ridge][name] / spread[name] if spread[name] > 0 else 0.0 for name in gates
    }
    return ridge, explained


def _solve(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The mean ``[H]`` and the matrix ``[D, H]`` of a ridge regression on standardised inputs."""
    base = y.mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.size(1), dtype=x.dtype)
    return base, torch.linalg.solve(gram, x.T @ (y - base))


def _left(x: Tensor, y: Tensor, held: Tensor, ridge: float) -> float:
    """The squared error on the held-out inputs."""
    base, matrix = _solve(x[~held], y[~held], ridge)
    return float((y[held] - base - x[held] @ matrix).square().sum())


@torch.no_grad()
def _set_threshold(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Tensor],
    gates: dict[str, HardConcreteGate],
    keep: float,
) -> float:
    """Shifts every ``log_alpha`` by one number so that the share of heads that run is ``keep``;
    returns the share."""
    best, total = (math.inf, 0.0, 0.0), 0.0
    for _ in range(_ROUNDS):
        logits, ran = _run(model, batches, forward)
        share = float(ran.double().mean())
        best = min(best, (abs(share - keep), share, total))
        if abs(share - keep) <= _CLOSE:
            break
        # A head runs if its logit is above a constant of the gate, which the selections show.
        bounds = [logits[~ran].max()] if not bool(ran.all()) else []
        bounds += [logits[ran].min()] if bool(ran.any()) else []
        kept = round(keep * logits.numel())
        wanted = [
            logits.kthvalue(rank).values
            for rank in (logits.numel() - kept, logits.numel() - kept + 1)
            if 1 <= rank <= logits.numel()
        ]
        step = float(sum(bounds) / len(bounds) - sum(wanted) / len(wanted))
        _shift(gates, step)
        total += step
    _shift(gates, best[2] - total)
    return best[1]


def _shift(gates: dict[str, HardConcreteGate], by: float) -> None:
    for gate in gates.values():
        gate.log_alpha += by


def _run(
    model: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """The logit of every head for every input, and whether it ran; flat."""
    logits, ran = [], []

    def see(name: str, layer: Any, selection: Selection, x: Tensor, padding: Any) -> None:
        assert selection.relevance is not None
        logits.append(selection.relevance.float().flatten().cpu())
        ran.append((selection.weight != 0).flatten().cpu())

    with instrument(model) as opened:
        opened.observe(see)
        for batch in batches:
            forward(opened.model, batch)
    return torch.cat(logits), torch.cat(ran)
