"""A sigmoid a head, cut at one half."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.linears import ReadLinear
from headwise.gates.options import finite, fraction, positive
from headwise.gates.selection import Selection
from headwise.gates.targeted import TargetedGate

_ops = torch.ops.headwise


class GumbelSigmoidGate(TargetedGate):
    r"""Every input opens or shuts every head by itself, as in AdaViT.

    Meng et al. (CVPR 2022, arXiv 2111.15668, section 3.2): a head runs, with weight 1, where
    :math:`y = \sigma((\ell + g_1 - g_2)/\tau) > 1/2`, :math:`g` Gumbel noise, with the gradient of
    :math:`y`; the usage loss is :math:`(\overline{m} - target)^2` of the share of heads that run.
    Evaluation has no noise. Ours: :math:`\ell = base + W z / \sqrt D` with :math:`z` as in
    :class:`BudgetGate` (AdaViT reads patch tokens), its schedule, and no noise from ``hard_from``.

    Args:
        target: mean share of the heads to run, in (0, 1].
        strength: factor of the usage loss.
        target_scope: ``"model"``: one target on the mean over all layers (through ``hw.penalty``);
            ``"layer"``: one for each.
        temperature: of the sigmoid in training.
        init_logit: initial value; 3 opens every head.
        warmup: progress at which the aimed share has come from ``initial_target`` to ``target``.
        initial_target: the aimed share at the start of training.
        static_until: progress at which the input's part sets in.
        hard_from: progress from which training has no noise; above 1: never.
        execution: see :class:`Gate`.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: ``logit [H]``, ``relevance.weight [H, D]``.

    Raises:
        ValueError: an argument out of its range; in a CPU forward, logits that are not finite.
    """

    logit: Tensor
    _READ = ("relevance",)
    _OPTIONS = {
        **TargetedGate._OPTIONS,
        "temperature": positive,
        "init_logit": finite,
        "initial_target": fraction,
    }

    def __init__(
        self,
        target: float = 0.5,
        *,
        strength: float = 20.0,
        target_scope: str = "model",
        temperature: float = 5.0,
        init_logit: float = 3.0,
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
        if self.training:
            self.expected_heads = expected
        return Selection(index, count, weight.to(x.dtype), logits)
