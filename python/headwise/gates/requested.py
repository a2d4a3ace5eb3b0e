"""A gate whose budget is an argument at run time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise.gates.distributed import whole
from headwise.gates.linears import ReadLinear
from headwise.gates.model import gates
from headwise.gates.scheduled import ScheduledGate
from headwise.gates.scope import ScopedGate
from headwise.gates.selection import Selection
from headwise.io.printable import quoted

_ops = torch.ops.headwise


class RequestedBudgetGate(ScopedGate, ScheduledGate):
    r"""One model, any cost: every call may request another share of the heads.

    Gates conditioned on a requested budget, as in budgeted attention allocation (arXiv
    2605.02697). Training draws a budget :math:`b` for every sequence; evaluation runs the one that
    was requested, exactly: :math:`K = \mathrm{round}(b N)` of the model's N heads for every input
    (at least one). The method is ours: a head's static score is :math:`base + tilt\,(b - 1/2)`; the
    K largest of the model decide how many heads each layer gets; which of them run in a layer
    depends on the input, by :math:`a = base + tilt\,(b - 1/2) + W z / \sqrt D` with :math:`z` as in
    :class:`BudgetGate`. Relaxation, noise and schedule are :class:`BudgetGate`'s.

    ::

        model = hw.convert(model, hw.RequestedBudgetGate())     # train with hw.anneal as usual
        hw.request_budget(model, 0.25)                          # a quarter of the heads from now on
        hw.request_budget(model, torch.tensor([0.25, 1.0]))     # or a budget for each sequence

    {options}

    Parameters: ``base [H]``, ``tilt [H]``, ``relevance.weight [H, D]``. The request is not saved: a
        loaded model runs ``budget``.

    Raises:
        ValueError: an argument out of its range; a request that is neither one budget nor one for
            each sequence; in a CPU forward, relevance that is not finite.
        RuntimeError: a forward of a gate of scope ``"model"`` that is not linked.
    """

    base: Tensor
    tilt: Tensor
    #: What was requested, float64 ``[]`` or ``[B]``; None: ``budget``. Not a buffer, because it is
    #: not model state; a tensor, so that another request recompiles nothing.
    requested: Tensor | None = None
    _READ = ("relevance",)

    def _build(self, device, dtype) -> None:
        super()._build(device, dtype)
        self._build_features(device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.base = Parameter(torch.empty(self.num_heads, **factory))
        self.tilt = Parameter(torch.empty(self.num_heads, **factory))
        self.relevance = ReadLinear(self.embed_dim, self.num_heads, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Small random ``base``; zero for all that multiplies the budget or the input."""
        if self.num_heads is None:
            return
        self.progress.zero_()
        self._reset_features()
        nn.init.normal_(self.base, std=0.01)
        nn.init.zeros_(self.tilt)
        nn.init.zeros_(self.relevance.weight)

    def _start(self, relevance: Tensor, budget: float) -> None:
        self.base.copy_(relevance)

    def request(self, budget: float | Tensor) -> None:
        """Sets what evaluation runs from now on: a share in (0, 1], or ``[B]``, one per sequence.

        Raises:
            ValueError: a share outside (0, 1], or a tensor of more than one dimension.
        """
        self.requested = _checked(budget).to(self.base.device)

    def _share_out(self, budget: Tensor) -> Tensor:
        """``[R]`` -> ``[R, N]``: which of the scope's heads the layers get."""
        members = self._joined().gates
        return _ops.allocate_budget(
            torch.cat([whole(gate.base) for gate in members]),
            torch.cat([whole(gate.tilt) for gate in members]),
            budget,
            self.progress,
            self.training,
            self.temperature,
            self.final_temperature,
            self.hard_from,
        )

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        budget: float | Tensor | None = None,
    ) -> Selection:
        """Chooses heads; ``budget`` replaces the request, for this call."""
        self._check_bound(x)
        scope = self._joined()
        features = self._features(x, key_padding_mask)  # [B, D]
        batch = x.size(0)
        if self.training:

            def sample() -> tuple[Tensor]:
                return (torch.rand(batch, device=features.device, dtype=features.dtype),)

            def make(uniform: Tensor) -> tuple[Tensor, Tensor]:
                drawn = uniform * (self.max_budget - self.min_budget) + self.min_budget  # [B]
                return drawn, self._share_out(drawn)

            asked, given = scope.draw(self._position, features, sample, make)
        else:
            wanted = self.requested if budget is None else _checked(budget)
            if wanted is None:
                wanted = features.new_full((1,), self.budget)
            asked = wanted.to(features.device, features.dtype).reshape(-1)  # [B] or [1]
            given = self._share_out(asked)  # [B or 1, N]
        if asked.size(0) not in (1, batch):
            raise ValueError(
                f"budget must be one for all sequences or one for each of the {batch}, "
                f"got {asked.size(0)}"
            )
        own = given.narrow(1, scope.start(self._position), self.num_heads)
        share = (own.detach().sum(1) / max(1, self.num_heads)).expand(batch)  # [B]
        relevance = self._input_relevance(
            features, self.base, self.relevance.weight, self.static_until
        ) + self.tilt.to(features.dtype) * (asked.unsqueeze(1) - 0.5)  # [B, H]
        noise = None
        if self.training and self.noise_scale > 0.0:
            noise = _ops.gumbel_noise(torch.rand_like(relevance))
        index, count, weight, expected = _ops.budget_select(
            relevance,
            share,
            self.progress,
            noise,
            self.training,
            self.execution == "all",
            self.temperature,
            self.final_temperature,
            self.noise_scale,
            self.hard_from,
            False,  # straight_through
            False,  # soft_weight
            self.min_heads,
            "round",
        )
        if self.training:
            self._record(expected_heads=expected)
            # The choice among layers answers for its own heads: zeros that carry the gradient.
            weight = weight + (own - own.detach())
        return Selection(index, count, weight.to(x.dtype), relevance, asked.expand(batch))


def _checked(budget: float | Tensor) -> Tensor:
    try:
        asked = torch.as_tensor(budget, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"budget must be a number or a tensor, got {quoted(budget)}") from None
    if asked.dim() > 1:
        raise ValueError(f"budget must have shape [] or [B], got {list(asked.shape)}")
    wrong = asked[~((asked > 0) & (asked <= 1))]
    if wrong.numel():
        raise ValueError(f"budget must be in (0, 1], got {wrong.reshape(-1)[0].item()}")
    return asked


def request_budget(model: nn.Module, budget: float | Tensor) -> None:
    """Makes every :class:`RequestedBudgetGate` of the model run this share of the heads from now
    on.

    Args:
        model: has such gates.
        budget: a share in (0, 1], or ``[B]``: one for each sequence of the batches to come.

    Raises:
        TypeError: ``budget`` is neither a number nor a tensor.
        ValueError: a share outside (0, 1], or a model without such a gate.
    """
    found = [gate for gate in gates(model) if isinstance(gate, RequestedBudgetGate)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) must have a RequestedBudgetGate")
    for gate in found:
        gate.request(budget)
