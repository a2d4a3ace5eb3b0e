"""Exactly K heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.options import at_least, choice, fraction, moment, optional, positive, unit
from headwise.gates.scheduled import ScheduledGate
from headwise.gates.scope import GateScope, ScopedGate
from headwise.gates.selection import Selection, select_all

_ops = torch.ops.headwise


class SubsetGate(ScopedGate, ScheduledGate):
    r"""Differentiable subset pruning: exactly K heads of the model, the same for every input.

    Li, Cotterell and Sachan (TACL 2021, arXiv 2108.04657). One score :math:`w` a head. Training
    with ``estimator="gumbel"`` draws in every forward :math:`r = w + g`, :math:`g` Gumbel noise,
    and relaxes the choice of the K largest: :math:`p_1 = \mathrm{softmax}(r/\tau)`,
    :math:`r \leftarrow r + \ln\max(1 - p_{j-1}, \epsilon)`, :math:`p_j = \mathrm{softmax}(r/\tau)`;
    a head's weight is :math:`\sum_j p_j`, and the weights sum to K. :math:`\ln\tau` falls linearly.
    With ``"straight_through"`` training runs the K heads of largest :math:`w`, without noise, and
    the gradient of the weights is passed to :math:`w` as it is. Evaluation runs the K heads of
    largest :math:`w` with weight 1 (ties: the earlier layer, the lower head).

    Ours: computed in float64; from ``hard_from`` on training runs the hard choice too; at low
    temperatures and many heads the gradient of :math:`\ln(1-p)` is scaled down as far as it must be
    for the product over K steps to stay finite (the published recursion gives NaN below a
    temperature of about 0.1; see ``src/gates/subset.cpp``). The authors clip the gradient of
    :math:`w` at norm 1; that is the training loop's to do.

    Which one should you use? Joint training is ``hw.convert(model, hw.SubsetGate(k=18))`` and a
    training loop; pipelined training freezes everything but the gates for the first part, then
    prunes (``hw.prune(model, hw.plan(scores))`` with the gates' ``scores``) and fine-tunes.

    Args:
        k: heads that run: of the whole model, or of each layer with ``scope="layer"``.
        keep: where ``k`` is not given, the share of the heads, rounded half up, at least one head.
        scope: ``"model"``: one choice among the heads of all layers (:func:`headwise.link_gates`,
            which ``convert`` and ``load`` call); ``"layer"``: one for each layer.
        estimator: ``"gumbel"`` or ``"straight_through"``.
        temperature: of the relaxation, at the start. The authors' 1000 gives all heads nearly equal
            weights at first; for a short training from a ranking begin near 1.
        final_temperature: of the relaxation, from ``cooled_at`` on. The authors go to 1e-8.
        cooled_at: progress at which ``final_temperature`` is reached.
        hard_from: progress from which training runs the hard choice; above 1: never.
        execution: see :class:`Gate`. While weights are relaxed every head has one, so all run.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: ``scores [H]``.

    Raises:
        ValueError: an argument out of its range; ``k`` above the number of heads (when the gates
            are linked); in a CPU forward, scores that are not finite.
        RuntimeError: a forward of a gate of scope ``"model"`` that is not linked.
    """

    scores: Tensor
    _OPTIONS = {
        "k": optional(at_least(1)),
        "keep": fraction,
        "scope": choice("model", "layer"),
        "estimator": choice("gumbel", "straight_through"),
        "temperature": positive,
        "final_temperature": positive,
        "cooled_at": unit,
        "hard_from": moment,
    }

    def __init__(
        self,
        k: int | None = None,
        *,
        keep: float = 0.5,
        scope: str = "model",
        estimator: str = "gumbel",
        temperature: float = 1000.0,
        final_temperature: float = 0.1,
        cooled_at: float = 0.68,
        hard_from: float = 0.75,
        execution: str = "all",
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(**self._declared(locals()))

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        self.scores = Parameter(torch.empty(self.num_heads, device=device, dtype=dtype))
        if self.scope == "layer":
            self._joined()  # says at once where k does not fit

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

    def _weigh(self) -> tuple[Tensor]:
        """``[N]``: the weight of every head of the scope."""
        scores = torch.cat([gate.scores for gate in self._scope.gates])  # [N]
        noise = None
        if self.training and self.estimator == "gumbel":
            noise = _ops.gumbel_noise(torch.rand_like(scores, dtype=torch.float64))  # [N]
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
        scores = torch.cat([gate.scores for gate in self._joined().gates])  # [N]
        weight = _ops.subset_weight(
            scores, None, self.progress, self.heads_kept, False, 1.0, 1.0, 1.0, 1.0
        )
        return weight.narrow(0, self._scope.start(self._position), self.num_heads)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        scope = self._joined()
        row = self.scores.detach()  # [H]
        if self.num_heads > 0:
            draw = scope.draw(self._position, self._weigh) if self.training else self._weigh()
            row = draw[0].narrow(0, scope.start(self._position), self.num_heads)
        weight = row.to(x.dtype).expand(x.size(0), -1)  # [B, H]
        relevance = _ops.static_relevance(self.scores, x)  # [B, H]
        if self.training:
            self.expected_heads = row.sum().expand(x.size(0))
        if self.training and self.execution == "all":
            index, count, _ = select_all(x.size(0), self.num_heads, device=x.device)[:3]
        else:
            index, count = _ops.select_nonzero(weight)
        return Selection(index, count, weight, relevance)
