"""Gates that are trained towards a share of the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.gates.base import Gate

_ops = torch.ops.headwise

TARGET_SCOPES = ("model", "layer")


class TargetedGate(Gate):
    """A gate with a target share of heads, a schedule and a penalty.

    Attributes:
        progress: float32 ``[]``, what :meth:`Gate.anneal` sets. A buffer that is saved, so that
            training resumes where it stopped, and so that annealing recompiles nothing.
        feature_mean: ``[D]``, running mean of the pooled input, where the gate sees its input.
        feature_variance: ``[D]``, its running variance.
        feature_batches: ``[]``, how many batches they have seen.
    """

    progress: Tensor
    feature_mean: Tensor
    feature_variance: Tensor
    feature_batches: Tensor
    penalty_form = "squared"
    _RECORDED = ("expected_heads", "_regulariser")

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        target: float,
        initial_target: float,
        target_scope: str,
        strength: float,
        warmup: float,
        static_until: float,
        hard_from: float,
        **binding: Any,
    ) -> None:
        check_fraction("target", target)
        check_fraction("initial_target", initial_target)
        if target_scope not in TARGET_SCOPES:
            raise ValueError(
                f"target_scope must be one of {', '.join(TARGET_SCOPES)}, got {target_scope!r}"
            )
        for name, value in (("warmup", warmup), ("static_until", static_until)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if not hard_from >= 0.0:
            raise ValueError(f"hard_from must not be negative, got {hard_from}")
        if not 0.0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and not negative, got {strength}")
        schedule = {
            "target": float(target),
            "target_scope": target_scope,
            "strength": float(strength),
            "warmup": float(warmup),
            "static_until": float(static_until),
            "hard_from": float(hard_from),
        }
        self.__dict__.update(schedule, initial_target=float(initial_target))
        super().__init__({**schedule, **options}, **binding)
        self._regulariser: Tensor | None = None

    def _build(self, device, dtype) -> None:
        self.register_buffer("progress", torch.zeros((), device=device, dtype=torch.float32))

    def _build_features(self, device, dtype) -> None:
        factory = {"device": device, "dtype": dtype}
        self.register_buffer("feature_mean", torch.zeros(self.embed_dim, **factory))
        self.register_buffer("feature_variance", torch.ones(self.embed_dim, **factory))
        self.register_buffer("feature_batches", torch.zeros((), device=device))

    def _reset_features(self) -> None:
        self.feature_mean.zero_()
        self.feature_variance.fill_(1.0)
        self.feature_batches.zero_()

    def _features(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """``[B, D]``: the masked mean, standardised over the inputs seen in training."""
        features = _ops.gate_features(x, key_padding_mask)
        if self.training:
            mean, variance, batches = _ops.update_statistics(
                features, self.feature_mean, self.feature_variance, self.feature_batches
            )
            self.feature_mean.copy_(mean)
            self.feature_variance.copy_(variance)
            self.feature_batches.copy_(batches)
        return _ops.standardize(features, self.feature_mean, self.feature_variance)

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        if self.num_heads is not None:
            self.progress.fill_(progress)

    def regulariser(self) -> Tensor | None:
        """The part of the penalty that belongs to this layer alone, or None."""
        return self._regulariser

    def penalty(self) -> Tensor:
        """This layer's regulariser, with a target of its own whatever ``target_scope`` says."""
        if self.num_heads is None or self.expected_heads is None:
            return super().penalty()
        term = pooled_penalty([self])
        return term if self._regulariser is None else term + self._regulariser

    def penalty_pool(self) -> tuple | None:
        """Gates of equal pools share one target; None: this gate has its own."""
        if self.target_scope != "model":
            return None
        return (type(self), self.target, self.strength, self.warmup, self.penalty_form)

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """Starts the gate from a static choice instead of from all heads.

        Args:
            relevance: ``[H]``, positive for heads that the static choice keeps.
            budget: share of the layer's heads that it keeps.

        Raises:
            ValueError: ``relevance`` is not finite or not of shape ``[H]``.
        """
        if relevance.shape != (self.num_heads,):
            raise ValueError(
                f"relevance must have shape [{self.num_heads}], got {list(relevance.shape)}"
            )
        if not bool(torch.isfinite(relevance).all()):
            raise ValueError("relevance must be finite")
        self._start(relevance, budget)

    def _start(self, relevance: Tensor, budget: float) -> None:
        raise NotImplementedError

    def _multipliers(self) -> Tensor | None:
        return None


def pooled_penalty(gates: Sequence[TargetedGate]) -> Tensor:
    """One penalty on the mean share of heads over the gates' layers and the batch."""
    first = gates[0]
    return _ops.target_penalty(
        [gate.expected_heads for gate in gates],
        [gate.num_heads for gate in gates],
        first.progress,
        first.target,
        first.initial_target,
        first.warmup,
        first.strength,
        first.penalty_form,
        first._multipliers(),
    )


def check_fraction(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
