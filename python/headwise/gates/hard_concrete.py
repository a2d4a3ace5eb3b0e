"""Stochastic gates that can be exactly zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.linears import ReadLinear
from headwise.gates.selection import Selection
from headwise.gates.targeted import TargetedGate

_ops = torch.ops.headwise


class HardConcreteGate(TargetedGate):
    r"""Hard-concrete gates: static, one ``log_alpha`` per head, or with a part that sees the input.

    As Voita et al. (arXiv 1905.09418) prune heads, after Louizos et al. (arXiv 1712.01312).
    Training draws :math:`u \sim U(\epsilon, 1-\epsilon)`, :math:`s = \sigma((\ln u - \ln(1-u) +
    \log\alpha)/\beta)`, :math:`g = \mathrm{clip}(s(\zeta-\gamma)+\gamma, 0, 1)`; evaluation takes
    :math:`s = \sigma(\log\alpha)`, without the division by :math:`\beta`. A head's weight is its
    gate; a head with gate 0 does not run. :math:`P(g > 0) = \sigma(\log\alpha - \beta
    \ln(-\gamma/\zeta))`.

    Ours: with ``input_dependent`` :math:`\log\alpha = base + W z / \sqrt D`, :math:`z` the mean
    of the layer's input over the tokens that are not padding, standardised as in
    :class:`BudgetGate`, :math:`W` zero at first and held there
    until ``static_until``; from ``hard_from`` on training takes evaluation's gates.

    {options}

    Parameters: ``log_alpha [H]``, with ``input_dependent`` also ``relevance.weight [H, D]``, with
    ``penalty="lagrangian"`` also ``multipliers [2]``.

    Raises:
        ValueError: an argument out of its range; in a CPU forward, ``log_alpha`` that is not
            finite.
    """

    log_alpha: Tensor
    _STRENGTHS = {"l0": 0.1}
    _READ = ("relevance",)

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.log_alpha = Parameter(torch.empty(self.num_heads, **factory))
        if self.input_dependent:
            self._build_features(device, dtype)
            self.relevance = ReadLinear(self.embed_dim, self.num_heads, bias=False, **factory)
        if self.penalty_form == "lagrangian":
            self.multipliers = Parameter(torch.empty(2, **factory))

    def reset_parameters(self) -> None:
        """Every gate open, nothing that depends on the input, multipliers zero."""
        if self.num_heads is None:
            return
        self.progress.zero_()
        nn.init.normal_(self.log_alpha, mean=self.init_log_alpha, std=0.01)
        if self.input_dependent:
            self._reset_features()
            nn.init.zeros_(self.relevance.weight)
        if self.penalty_form == "lagrangian":
            nn.init.zeros_(self.multipliers)

    def _start(self, relevance: Tensor, budget: float) -> None:
        # P(open) is 1/2 at relevance 0.
        self.log_alpha.copy_(relevance + self.beta * math.log(-self.gamma / self.zeta))

    @torch.no_grad()
    def static_weight(self) -> Tensor | None:
        if self.input_dependent:
            return None
        _, _, weight, _ = _ops.hard_concrete_select(
            self.log_alpha.unsqueeze(0),  # [1, H]
            None,
            self.progress,
            False,
            False,
            self.hard_from,
            self.beta,
            self.gamma,
            self.zeta,
            self.kept_weight == "one",
        )
        return weight.squeeze(0)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        if self.input_dependent:
            log_alpha = self._relevance_of(
                x, key_padding_mask, self.log_alpha, self.relevance.weight, self.static_until
            )  # [B, H]
        else:
            log_alpha = _ops.static_relevance(self.log_alpha, x)  # [B, H]
        sample = self.training and self.kept_weight == "gate"
        noisy = log_alpha[:1] if self.noise_per == "batch" else log_alpha  # [1, H] or [B, H]
        uniform = torch.rand_like(noisy) if sample else None
        index, count, weight, expected = _ops.hard_concrete_select(
            log_alpha,
            uniform,
            self.progress,
            self.training,
            self.execution == "all",
            self.hard_from,
            self.beta,
            self.gamma,
            self.zeta,
            self.kept_weight == "one",
        )
        self._record(expected_heads=expected)
        return Selection(index, count, weight.to(x.dtype), log_alpha)

    def _multipliers(self) -> Tensor | None:
        return self.multipliers if self.penalty_form == "lagrangian" else None
