"""A head budget and a relevance per head, for every input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.linears import ReadLinear
from headwise.gates.selection import Selection
from headwise.gates.targeted import TargetedGate

_ops = torch.ops.headwise


class BudgetGate(TargetedGate):
    r"""Every input gets a number of heads and keeps the most relevant ones.

    After BudgetFormer (arXiv 2604.22583): with :math:`z` the mean of the layer's input over the
    tokens that are not padding, the budget is :math:`s = \sigma(\mathrm{FFN}(z))`, a share of the
    heads, and the relevance :math:`a \in R^H` is linear in :math:`z`; evaluation runs the
    :math:`k = \mathrm{round}(s H)` most relevant heads. The paper does not publish its soft gate,
    noise, schedules and loss weights; these are ours:

    - :math:`z` is standardised with the running mean and variance of the inputs seen in training
      (not over its D entries, which would leave in what all inputs share, a second static part),
      and detached.
    - :math:`a = base + W z / \sqrt D`, where :math:`base` does not depend on the input and
      :math:`W` starts at zero and is held there until ``static_until``: first a static gate, then
      the input's part as a residual. The budget's network does the same. A gate that learns both
      at once tends to collapse into a static one, and a worse one. (After
      :func:`headwise.start_gates` the static phase is not needed: ``static_until=0, warmup=0,
      hard_from=0.3, noise_scale=0``.)
    - Training weights the heads by :math:`m_h = \sigma((a_h - t)/\tau)` with :math:`t` solved for
      every input so that :math:`\sum_h m_h = s H`; its gradient (of the implicit function) reaches
      :math:`a` and :math:`s`. Noise on :math:`a` and :math:`\tau` are annealed.
    - From ``hard_from`` on, training uses evaluation's selection and weights; the gradient is still
      that of :math:`m_h` (straight-through).
    - The budget is higher at the start (``initial_keep``) and decreases until ``warmup``.
    - The penalty aims at the *mean* budget over the batch, and over layers too with
      ``target_scope="model"``, so inputs and layers may differ.

    Call ``hw.anneal(model, step / steps)`` before every training step: without it the gate stays in
    its first, static and soft, phase.

    {options}

    Parameters: ``base [H]``, ``relevance.weight [H, D]``, and if the budget is predicted
    ``budget_hidden.{weight [h, D], bias [h]}`` and ``budget_out.{weight [1, h], bias [1]}``.

    Raises:
        ValueError: an argument out of its range; in a CPU forward, relevance that is not finite.
    """

    base: Tensor
    _READ = ("relevance", "budget_hidden", "budget_out")

    def _prepare(self) -> None:
        super()._prepare()
        self.fixed_budget = 1.0 if self.budget is None and self.keep == 1.0 else self.budget

    @property
    def learns_count(self) -> bool:
        return self.fixed_budget is None

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        self._build_features(device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.base = Parameter(torch.empty(self.num_heads, **factory))
        self.relevance = ReadLinear(self.embed_dim, self.num_heads, bias=False, **factory)
        if self.fixed_budget is None:
            hidden = self.hidden_dim or max(8, self.embed_dim // 8)
            self.budget_hidden = ReadLinear(self.embed_dim, hidden, **factory)
            self.budget_out = ReadLinear(hidden, 1, **factory)

    def reset_parameters(self) -> None:
        """Small random ``base``; zero for everything that multiplies the input; the target as
        budget."""
        if self.num_heads is None:
            return
        self.progress.zero_()
        self._reset_features()
        nn.init.normal_(self.base, std=0.01)
        nn.init.zeros_(self.relevance.weight)
        if self.fixed_budget is None:
            # Its input has norm one: unit weights give hidden units of order one.
            nn.init.normal_(self.budget_hidden.weight)
            nn.init.zeros_(self.budget_hidden.bias)
            nn.init.zeros_(self.budget_out.weight)
            self._set_budget(self.keep)

    @torch.no_grad()
    def _set_budget(self, budget: float) -> None:
        held = min(max(budget, self.min_budget, 1e-3), self.max_budget, 1 - 1e-3)
        self.budget_out.bias.fill_(math.log(held / (1.0 - held)))

    def _start(self, relevance: Tensor, budget: float) -> None:
        self.base.copy_(relevance)
        if self.fixed_budget is None:
            self._set_budget(budget)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        if not self.training and self.kept_weight == "one":
            return self._evaluate(x, key_padding_mask)
        features = self._features(x, key_padding_mask)  # [B, D]
        relevance = self._input_relevance(
            features, self.base, self.relevance.weight, self.static_until
        )  # [B, H]
        asked: Tensor | None = None  # [B]
        if self.fixed_budget is None:
            budget, asked = _ops.head_budget(
                features,
                self.budget_hidden.weight,
                self.budget_hidden.bias,
                self.budget_out.weight,
                self.budget_out.bias,
                self.progress,
                self.training,
                self.min_budget,
                self.max_budget,
                self.keep,
                self.initial_keep,
                self.warmup,
                self.static_until,
            )  # [B]
        else:
            budget = features.new_full((x.size(0),), self.fixed_budget)  # [B]
        index, count, weight, expected = _ops.budget_select(
            relevance,
            budget,
            self.progress,
            self._draw_noise(relevance) if self.training else None,
            self.training,
            self.execution == "all",
            self.temperature,
            self.final_temperature,
            self.noise_scale,
            self.hard_from,
            self.relaxation == "straight_through",
            self.kept_weight == "soft",
            self.min_heads,
            self.rounding,
        )
        if self.training:
            self._record(expected_heads=expected, _regulariser=self._own_terms(relevance, asked))
        return Selection(index, count, weight.to(x.dtype), relevance, budget)

    def _evaluate(self, x: Tensor, key_padding_mask: Tensor | None) -> Selection:
        network: tuple[Tensor | None, ...] = (None,) * 4
        if self.fixed_budget is None:
            hidden, out = self.budget_hidden, self.budget_out
            network = (hidden.weight, hidden.bias, out.weight, out.bias)
        return Selection(
            *_ops.evaluate_budget_gate(
                x,
                key_padding_mask,
                self.feature_mean,
                self.feature_variance,
                self.base,
                self.relevance.weight,
                *network,
                self.progress,
                1.0 if self.fixed_budget is None else self.fixed_budget,
                self.min_budget,
                self.max_budget,
                self.keep,
                self.initial_keep,
                self.warmup,
                self.min_heads,
                self.rounding,
            )
        )

    def _draw_noise(self, relevance: Tensor) -> Tensor | None:
        if self.noise_scale == 0.0:
            return None
        if self.noise == "normal":
            return torch.randn_like(relevance)
        return _ops.gumbel_noise(torch.rand_like(relevance))

    def _own_terms(self, relevance: Tensor, asked: Tensor | None) -> Tensor | None:
        terms: Tensor | None = None
        if asked is not None and self.bounds_strength > 0.0:
            bounds = _ops.budget_bounds(asked, self.min_budget, self.max_budget)
            terms = self.bounds_strength * bounds
        if self.entropy_strength != 0.0:
            schedule = (2.0 * self.progress - 1.0) * self.entropy_strength
            entropy = schedule * _ops.relevance_entropy(relevance)
            terms = entropy if terms is None else terms + entropy
        return terms
