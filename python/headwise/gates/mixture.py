"""Every token chooses its heads by a learned router."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwise.gates.base import Gate
from headwise.gates.linears import ReadLinear
from headwise.gates.options import checked
from headwise.gates.padding import is_padding
from headwise.gates.selection import Selection, TokenSelection
from headwise.io.printable import quoted

_ops = torch.ops.headwise


class MixtureOfHeadsGate(Gate, configured=True):
    r"""Some heads run for every token; of the others, each token chooses its own.

    Mixture-of-heads attention (MoH, Jin et al. 2024, arXiv 2410.11842). With s shared heads, R
    routed ones of which a token x runs k, and :math:`p = \mathrm{softmax}(W_r x)`, a head's weight
    is

    .. math::
        w_i = \begin{cases}
            2 a_1\, s\, \mathrm{softmax}(W_s x)_i & \text{shared} \\
            2 a_2\, k\, p_i / \sum_{j\ \text{chosen}} p_j & \text{routed, among the k largest} \\
            0 & \text{otherwise,}
        \end{cases}
        \qquad (a_1, a_2) = \mathrm{softmax}(W_h x)

    as in the authors' released code. The paper's equations have neither the factors nor the
    normalisation; with them the weights have a mean near 1, as without a gate. With one shared head
    there is no :math:`W_s`, and with one kind of heads no :math:`W_h`.

    The penalty is ``strength`` times the load balance loss :math:`R \sum_i f_i P_i` over the routed
    heads: :math:`f_i` is the share of the batch's tokens that run head i, and :math:`P_i` the mean
    of their :math:`p_i`. Padding is left out, and a token of padding runs no head.

    With ``routing="token"`` a layer on a CPU computes a head's queries, attention and output
    projection for the tokens that chose it, and its keys and values for the sequences in which one
    did, forward and backward (``torch.ops.headwise.routed_multihead_attention``). On other devices,
    in ONNX, and in training steps in bfloat16, which take less time that way, every head runs and
    is masked. Only :class:`headwise.MultiheadAttention` can do that; what reads one selection per
    sequence (:func:`headwise.trace`, explanations, scores) raises an error. ``routing="sequence"``
    works everywhere: the mean of a sequence's tokens is routed, once.

    Heads that a token did not choose get no gradient from it, as in the released code.

    ::

        hw.MixtureOfHeadsGate(keep=0.5, shared=2)

    Args:
        keep: share of the heads that a token runs, the shared ones among them: ``round(keep * H)``
            heads, of which one at least is routed (in (0, 1]).
        shared: which heads run for every token, or how many: the first ones until
            :func:`headwise.start_gates` chooses.
        routing: ``"token"``, as in the paper; or ``"sequence"``: all tokens have the heads that
            their mean chooses. Ours.
        strength: factor of the load balance loss (not negative; the released code's for images).
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters.
        dtype: of the parameters.

    Buffer ``shared`` int64 ``[s]``, ascending. Parameters ``router.weight`` ``[R, D]``,
    ``shared_router.weight`` ``[s, D]`` and ``kind_router.weight`` ``[2, D]``.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of its range, a shared head outside ``0..H-1`` or named twice.
    """

    shared: Tensor
    balance: Tensor | None
    _RECORDED = (*Gate._RECORDED, "balance")

    def __init__(
        self,
        keep: float = 0.5,
        *,
        shared: int | Sequence[int] = 1,
        routing: str = "token",
        strength: float = 0.01,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        # The checks of other gates' options of these names.
        share = checked("RandomGate", {"keep": keep})["keep"]
        always = {"gate": {"type": "FixedGate"}, "shared": shared}
        found = sorted(checked("SharedHeadsGate", always)["shared"])
        strength = checked("BudgetGate", {"strength": strength})["strength"]
        if routing not in ("token", "sequence"):
            raise ValueError(f"routing must be one of token, sequence, got {quoted(routing)}")
        options = {"keep": share, "shared": found, "routing": routing, "strength": strength}
        if num_heads is not None and found and found[-1] >= num_heads:
            raise ValueError(f"shared must be in 0..{num_heads - 1}, got {found[-1]}")
        super().__init__(
            options, embed_dim=embed_dim, num_heads=num_heads, device=device, dtype=dtype
        )

    #: Weights that are 0 have no gradient: nothing is lost by not running those heads.
    execution = "selected"

    @property
    def routes_tokens(self) -> bool:  # type: ignore[override]
        return self.routing == "token"

    @property
    def how(self) -> str:  # type: ignore[override]
        shared = len(self._options["shared"])
        return (
            f"{shared} {'head runs' if shared == 1 else 'heads run'} for every input; of the "
            "others, those that a learned router scores highest for the mean of its tokens."
        )

    def _prepare(self) -> None:
        self.balance = None

    def _build(self, device, dtype) -> None:
        heads = self.__dict__.pop("shared")  # the option, which the buffer replaces
        self.register_buffer("shared", torch.tensor(heads, dtype=torch.int64, device=device))
        always, routed = len(heads), self.num_heads - len(heads)
        #: How many of the routed heads a token runs.
        self.routed = math.floor(self.keep * self.num_heads + 0.5) - always
        self.routed = min(max(self.routed, min(1, routed)), routed)

        def linear(out: int, needed: bool) -> nn.Linear | None:
            like = {"device": device, "dtype": dtype}
            return ReadLinear(self.embed_dim, out, bias=False, **like) if needed else None

        self.router = linear(routed, routed > 0)
        self.shared_router = linear(always, always > 1)
        self.kind_router = linear(2, always > 0 and routed > 0)

    def reset_parameters(self) -> None:
        heads = torch.tensor(self._options["shared"], dtype=torch.int64)
        self.shared.copy_(heads)
        for linear in self.children():
            linear.reset_parameters()

    def start_from(self, relevance: Tensor, budget: float) -> None:
        """The most relevant heads become the shared ones."""
        self._check_relevance(relevance)
        order = relevance.argsort(descending=True, stable=True)
        self.shared.copy_(order[: len(self.shared)].sort().values)

    def penalty(self) -> Tensor:
        """``strength`` times the load balance loss of the last training forward."""
        return super().penalty() if self.balance is None else self.strength * self.balance

    def _route(self, x: Tensor, padding: Tensor | None) -> TokenSelection:
        """Of rows ``[.., D]``; none is chosen where ``padding`` ``[..]`` is True."""
        router = x.new_zeros((*x.shape[:-1], 0)) if self.router is None else self.router(x)
        shared = None if self.shared_router is None else self.shared_router(x)
        kinds = None if self.kind_router is None else self.kind_router(x)
        chosen, weight, relevance = _ops.route_heads(
            router, shared, kinds, self.shared, self.routed, padding
        )
        if self.training:
            self._record(balance=_ops.routing_balance(relevance, chosen, self.shared, padding))
        return TokenSelection(chosen, weight.to(x.dtype), relevance)

    def forward(  # type: ignore[override]
        self, x: Tensor, key_padding_mask: Tensor | None = None
    ) -> Selection | TokenSelection:
        self._check_bound(x)
        if self.routes_tokens:
            padding = None if key_padding_mask is None else is_padding(key_padding_mask)
            return self._route(x, padding)
        chosen, weight, relevance = self._route(_ops.masked_mean(x, key_padding_mask), None)
        heads = self.routed + len(self.shared)
        count = torch.full((x.size(0),), heads, dtype=torch.int32, device=x.device)
        return Selection(_ops.select_heads(chosen.float(), count), count, weight, relevance)
