"""Gates that are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.gates.base import Gate
from headwise.gates.distributed import pooled
from headwise.gates.recomputation import may_be_recomputed, recomputing

_ops = torch.ops.headwise


class ScheduledGate(Gate):
    """A gate that is trained, in phases that :meth:`Gate.anneal` moves through.

    Attributes:
        progress: float32 ``[]``, what :meth:`Gate.anneal` sets. A buffer that is saved, so that
            training resumes where it stopped, and so that annealing recompiles nothing.
        feature_mean: ``[D]``, running mean of the pooled input, if the gate sees its input.
        feature_variance: ``[D]``, its running variance.
        feature_batches: ``[]``, how many batches they have seen.
    """

    progress: Tensor
    feature_mean: Tensor
    feature_variance: Tensor
    feature_batches: Tensor

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
        statistics = (self.feature_mean, self.feature_variance)
        if not self.training:
            return _ops.standardize(_ops.gate_features(x, key_padding_mask), *statistics)
        repeated = recomputing()
        if repeated:
            mark = _ops.gate_features(x, key_padding_mask)
            statistics = self._replay.recall(mark) or statistics
        if self._groups or torch.compiler.is_compiling():
            features = _ops.gate_features(x, key_padding_mask)
            moments = pooled(_ops.feature_moments(features), () if repeated else self._groups)
            _ops.update_statistics(moments, *statistics, self.feature_batches)
            features = _ops.standardize(features, *statistics)
        else:
            features = _ops.learn_features(x, key_padding_mask, *statistics, self.feature_batches)
        if not repeated and may_be_recomputed():
            mark = _ops.gate_features(x, key_padding_mask)
            self._replay.remember(mark, lambda: tuple(part.clone() for part in statistics))
        return features

    @torch.no_grad()
    def _align(self) -> None:
        if "feature_mean" not in self._buffers:
            return
        mean, variance = self.feature_mean.double(), self.feature_variance.double()
        one = torch.ones(1, dtype=mean.dtype, device=mean.device)
        moments = pooled(torch.cat([one, mean, variance + mean.square()]), self._groups)
        mean, square = (moments[1:] / moments[0]).chunk(2)
        self.feature_mean.copy_(mean)
        self.feature_variance.copy_(square - mean.square())

    def _relevance_of(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        base: Tensor,
        weight: Tensor,
        static_until: float,
    ) -> Tensor:
        """``[B, H]``: base ``[H]`` + weight ``[H, D]`` features / sqrt(D); in training base alone
        until progress reaches ``static_until``."""
        if not self.training:
            return _ops.evaluate_relevance(
                x,
                key_padding_mask,
                self.feature_mean,
                self.feature_variance,
                base,
                weight,
                self.progress,
            )
        return self._input_relevance(
            self._features(x, key_padding_mask), base, weight, static_until
        )

    def _input_relevance(
        self, features: Tensor, base: Tensor, weight: Tensor, static_until: float
    ) -> Tensor:
        """As :meth:`_relevance_of`, of :meth:`_features`."""
        return _ops.input_relevance(
            features, base, weight, self.progress, self.training, static_until
        )

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        if self.num_heads is not None:
            self.progress.fill_(progress)

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """Starts the gate from a static choice instead of from all heads.

        Args:
            relevance: ``[H]``, positive for heads that the static choice keeps.
            budget: share of the layer's heads that it keeps.

        Raises:
            ValueError: ``relevance`` is not finite or not of shape ``[H]``.
        """
        self._check_relevance(relevance)
        with torch.no_grad():
            self._start(relevance, budget)

    def _start(self, relevance: Tensor, budget: float) -> None:
        raise NotImplementedError
