"""Stochastic gates that can be exactly zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.linears import ReadLinear
from headwise.gates.options import choice, finite, flag, fraction, positive
from headwise.gates.selection import Selection
from headwise.gates.targeted import TargetedGate

_ops = torch.ops.headwise


class HardConcreteGate(TargetedGate):
    r"""Hard-concrete gates: static, one ``log_alpha`` a head, or with a part that sees the input.

    As Voita et al. (arXiv 1905.09418) prune heads, after Louizos et al. (arXiv 1712.01312).
    Training draws :math:`u \sim U(\epsilon, 1-\epsilon)`, :math:`s = \sigma((\ln u - \ln(1-u) +
    \log\alpha)/\beta)`, :math:`g = \mathrm{clip}(s(\zeta-\gamma)+\gamma, 0, 1)`; evaluation takes
    :math:`s = \sigma(\log\alpha)`, without the division by :math:`\beta`. A head's weight is its
    gate; a head whose gate is 0 does not run. :math:`P(g > 0) = \sigma(\log\alpha - \beta
    \ln(-\gamma/\zeta))`.

    Ours: with ``input_dependent`` :math:`\log\alpha = base + W z / \sqrt D`, :math:`z` the mean
    of the layer's input over the tokens that are not padding, standardised as in
    :class:`BudgetGate`, :math:`W` zero at first and held there
    until ``static_until``; from ``hard_from`` on training takes evaluation's gates.

    Args:
        target: mean share of the heads to run, in (0, 1]; not used by ``penalty="l0"``.
        input_dependent: add the part that sees the input.
        penalty: ``"squared"``: ``strength (share - target)^2``; ``"lagrangian"``:
            ``strength (m_0 d + m_1 d^2)`` with ``d = share - target`` and two multipliers that the
            same optimiser ascends (Xia et al. 2022, arXiv 2204.00408); ``"l0"``: ``strength`` times
            the expected number of open heads a layer (Voita et al.).
        strength: see ``penalty``.
        target_scope: ``"model"``: one target on the mean over all layers (through ``hw.penalty``);
            ``"layer"``: one for each.
        kept_weight: ``"gate"``, the value of the gate; or ``"one"``: no samples, a head is open,
            with weight 1, where P(g > 0) > 1/2, in training and in evaluation, and the gradient is
            that of P(g > 0). Ours.
        init_log_alpha: initial value; 3 opens every gate wholly in evaluation.
        beta: temperature of the samples.
        gamma: lower end of the stretch, below 0.
        zeta: upper end of the stretch, above 1.
        warmup: progress at which the aimed share has come from ``initial_target`` to ``target``.
        initial_target: the aimed share at the start of training.
        static_until: progress at which the input's part sets in.
        hard_from: progress from which training takes evaluation's gates; above 1: never.
        execution: see :class:`Gate`.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: ``log_alpha [H]``, with ``input_dependent`` also ``relevance.weight [H, D]``, with
    ``penalty="lagrangian"`` also ``multipliers [2]``.

    Raises:
        ValueError: an argument out of its range; in a CPU forward, ``log_alpha`` that is not
            finite.
    """

    log_alpha: Tensor
    _READ = ("relevance",)
    _OPTIONS = {
        **TargetedGate._OPTIONS,
        "input_dependent": flag,
        "penalty": choice("squared", "lagrangian", "l0"),
        "kept_weight": choice("gate", "one"),
        "init_log_alpha": finite,
        "beta": positive,
        "gamma": finite,
        "zeta": finite,
        "initial_target": fraction,
    }

    def __init__(
        self,
        target: float = 0.5,
        *,
        input_dependent: bool = False,
        penalty: str = "squared",
        strength: float = 20.0,
        target_scope: str = "model",
        kept_weight: str = "gate",
        init_log_alpha: float = 3.0,
        beta: float = 0.33,
        gamma: float = -0.1,
        zeta: float = 1.1,
        warmup: float = 0.3,
        initial_target: float = 0.95,
        static_until: float = 0.4,
        hard_from: float = 0.75,
        execution: str = "all",
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(**self._declared(locals()))

    def _check_options(self) -> None:
        if not (self.gamma < 0.0 and self.zeta > 1.0):
            raise ValueError(
                f"gamma must be below 0 and zeta above 1, got {self.gamma} and {self.zeta}"
            )

    @property
    def penalty_form(self) -> str:
        return self._options["penalty"]

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
        # P(open) is 1/2 where the relevance is 0.
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
        uniform = torch.rand_like(log_alpha) if sample else None
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
        if self.training:
            self.expected_heads = expected
        return Selection(index, count, weight.to(x.dtype), log_alpha)

    def _multipliers(self) -> Tensor | None:
        return self.multipliers if self.penalty_form == "lagrangian" else None
