"""One sigmoid per head, cut at one half."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.linears import ReadLinear
from headwise.gates.selection import Selection
from headwise.gates.targeted import TargetedGate

_ops = torch.ops.headwise


class GumbelSigmoidGate(TargetedGate):
    r"""Every input switches each head on or off separately, as in AdaViT.

    Meng et al. (CVPR 2022, arXiv 2111.15668, section 3.2): a head runs, with weight 1, if
    :math:`y = \sigma((\ell + g_1 - g_2)/\tau) > 1/2`, :math:`g` Gumbel noise, with the gradient of
    :math:`y`; the usage loss is :math:`(\overline{m} - target)^2` of the share of heads that run,
    or, with ``penalty="adavit"``, the losses of the released code. Evaluation has no noise. Ours:
    :math:`\ell = base + W z / \sqrt D` with :math:`z` as in :class:`BudgetGate` (AdaViT reads
    patch tokens), its schedule, and no noise from ``hard_from``.

    {options}

    Parameters: ``logit [H]``, ``relevance.weight [H, D]``.

    Raises:
        ValueError: an argument out of its range; in a CPU forward, logits that are not finite.
    """

    logit: Tensor
    _STRENGTHS = {"adavit": 2.0}
    _READ = ("relevance",)

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        self._build_features(device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.logit = Parameter(torch.empty(self.num_heads, **factory))
        self.relevance = ReadLinear(self.embed_dim, self.num_heads, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Every head open, nothing that depends on the input."""
        if self.num_heads is None:
            return
        self.progress.zero_()
        self._reset_features()
        nn.init.normal_(self.logit, mean=self.init_logit, std=0.01)
        nn.init.zeros_(self.relevance.weight)

    def _start(self, relevance: Tensor, budget: float) -> None:
        self.logit.copy_(relevance)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        logits = self._relevance_of(
            x, key_padding_mask, self.logit, self.relevance.weight, self.static_until
        )  # [B, H]
        index, count, weight, expected = _ops.gumbel_sigmoid_select(
            logits,
            torch.rand_like(logits) if self.training else None,
            self.progress,
            self.training,
            self.execution == "all",
            self.hard_from,
            self.temperature,
        )
        own = None
        if self.training and self.penalty_form == "adavit":
            own = _ops.gumbel_sigmoid_regulariser(
                logits,
                weight,
                self.progress,
                self.keep,
                self.initial_keep,
                self.warmup,
                self.strength,
            )
        self._record(expected_heads=expected, _regulariser=own)
        return Selection(index, count, weight.to(x.dtype), logits)
