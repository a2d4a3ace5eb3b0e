"""K heads of a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.distributed import whole
from headwise.gates.scheduled import ScheduledGate
from headwise.gates.scope import GateScope, ScopedGate
from headwise.gates.selection import Selection, select_all

_ops = torch.ops.headwise


class SubsetGate(ScopedGate, ScheduledGate):
    r"""Differentiable subset pruning: K heads of the model, the same for every input.

    Li, Cotterell and Sachan (TACL 2021, arXiv 2108.04657). One score :math:`w` per head. Training
    with ``estimator="gumbel"`` draws in every forward :math:`r = w + g`, :math:`g` Gumbel noise,
    and relaxes the choice of the K largest: :math:`p_1 = \mathrm{softmax}(r/\tau)`, :math:`r
    \leftarrow r + \ln\max(1 - p_{j-1}, \epsilon)`, :math:`p_j = \mathrm{softmax}(r/\tau)`; a head's
    weight is :math:`\sum_j p_j`, and the weights sum to K. :math:`\ln\tau` falls linearly. With
    ``"straight_through"`` training runs the K heads of largest :math:`w`, without noise, and the
    gradient of the weights is passed to :math:`w` as it is. Evaluation runs the K heads of largest
    :math:`w` with weight 1 (ties: the earlier layer, the lower head). Exactly K heads run in
    evaluation, and in training from ``hard_from`` on; before that the relaxed weights sum to K and
    every head runs. :math:`\epsilon` is the smallest normal float64, as in the authors' code.

    Ours: computed in float64; from ``hard_from`` on training runs the hard choice too; at low
    temperatures and many heads the gradient of :math:`\ln(1-p)` is scaled down just enough for the
    product over K steps to stay finite (the published recursion gives NaN below a temperature of
    about 0.1; see ``src/ops/gates/subset.cpp``). The authors clip the gradient of :math:`w` at norm
    1; here the training loop has to do that.

    Which one should you use? Joint training is ``hw.convert(model, hw.SubsetGate(k=18))`` and a
    training loop; pipelined training freezes everything but the gates for the first part, then
    prunes (``hw.prune(model, hw.plan(scores))`` with the gates' ``scores``) and fine-tunes.

    {options}

    Parameters: ``scores [H]``.

    Raises:
        ValueError: an argument out of its range; ``k`` above the number of heads (when the gates
            are linked); in a CPU forward, scores that are not finite.
        RuntimeError: a forward of a gate of scope ``"model"`` that is not linked.
    """

    scores: Tensor

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        self.scores = Parameter(torch.empty(self.num_heads, device=device, dtype=dtype))
        if self.scope == "layer":
            self._joined()  # raises at once if k does not fit

    def reset_parameters(self) -> None:
        """Small random scores."""
        if self.num_heads is not None:
            self.progress.zero_()
            nn.init.normal_(self.scores, std=0.01)

    def _start(self, relevance: Tensor, budget: float) -> None:
        self.scores.copy_(relevance)

    def join(self, scope: GateScope, position: int) -> None:
        heads = scope.num_heads
        if self.k is not None and self.k > heads:
            raise ValueError(f"k must be in 1..{heads}, got {self.k}")
        super().join(scope, position)

    @property
    def heads_kept(self) -> int:
        """K: the heads that run, of the gate's scope."""
        heads = self._joined().num_heads
        if self.k is not None:
            return self.k
        return min(max(math.floor(self.keep * heads + 0.5), min(1, heads)), heads)

    def _noise(self) -> tuple[Tensor, ...]:
        """``[N]``, for the heads of the scope."""
        if self.estimator != "gumbel":
            return ()
        heads = self._joined().num_heads
        uniform = torch.rand(heads, dtype=torch.float64, device=self.scores.device)
        return (_ops.gumbel_noise(uniform),)

    def _weigh(self, noise: Tensor | None = None) -> tuple[Tensor]:
        """``[N]``: the weight of every head of the scope."""
        scores = torch.cat([whole(gate.scores) for gate in self._joined().gates])  # [N]
        weight = _ops.subset_weight(
            scores,
            noise,
            self.progress,
            self.heads_kept,
            self.training,
            self.temperature,
            self.final_temperature,
            self.cooled_at,
            self.hard_from,
        )
        return (weight,)

    @torch.no_grad()
    def static_weight(self) -> Tensor:
        scores = torch.cat([whole(gate.scores) for gate in self._joined().gates])  # [N]
        weight = _ops.subset_weight(
            scores, None, self.progress, self.heads_kept, False, 1.0, 1.0, 1.0, 1.0
        )
        return weight.narrow(0, self._joined().start(self._position), self.num_heads)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        scope = self._joined()
        row = self.scores.detach()  # [H]
        if self.num_heads > 0:
            if self.training:
                draw = scope.draw(self._position, x, self._noise, self._weigh)
            else:
                draw = self._weigh()
            row = draw[0].narrow(0, scope.start(self._position), self.num_heads)
        weight = row.to(x.dtype).expand(x.size(0), -1)  # [B, H]
        relevance = _ops.static_relevance(self.scores, x)  # [B, H]
        self._record(expected_heads=row.sum().expand(x.size(0)))
        if self.training and self.execution == "all":
            index, count, _ = select_all(x.size(0), self.num_heads, device=x.device)[:3]
        else:
            index, count = _ops.select_nonzero(weight)
        return Selection(index, count, weight, relevance)
