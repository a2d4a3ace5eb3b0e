"""A bank of plans: each input runs the heads, and the output projections, of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise._C import LayerPlan
from headwise.gates.base import Gate
from headwise.gates.options import checked
from headwise.gates.padding import is_padding
from headwise.gates.scope import ScopedGate
from headwise.gates.selection import Selection
from headwise.io.printable import quoted

#: What a router can read of a layer's input, over the tokens that are not padding.
FEATURES = ("mean", "first", "max")

_MOST_LAYERS = 2**16


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {quoted(values)}")
    return list(values)


def _heads(plan: Any) -> list[int]:
    """The heads of a plan, checked as :class:`FixedGate` checks its own."""
    try:
        return list(checked("FixedGate", {"heads": _listed("heads", plan)})["heads"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"plans: {error}") from None


def router_features(x: Tensor, padding: Tensor | None, features: Sequence[str]) -> Tensor:
    """float32 ``[B, len(features) D]`` of x ``[B, L, D]``: its mean, first token and maximum, in
    the order of ``features``, over the tokens that are not padding ``[B, L]``."""
    x = x.float()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if padding is not None:
        valid = ~is_padding(padding)
    parts = []
    for feature in features:
        if feature == "mean":
            total = (x * valid[..., None]).sum(1)
            parts.append(total / valid.sum(1, keepdim=True).clamp(min=1))
        elif feature == "first":
            first = valid.int().argmax(1)  # [B]: of a prompt padded on the left, not its start
            parts.append(x[torch.arange(len(x), device=x.device), first])
        else:
            parts.append(
                x.masked_fill(~valid[..., None], -torch.inf).amax(1).nan_to_num(neginf=0.0)
            )
    return torch.cat(parts, 1)


class BankSelection(Selection):
    """A selection, and the plan that each input follows.

    Attributes:
        plan: int64 ``[B]``.
        whole: whether it is all of the plan's heads, with weight one.
        mixed: whether the batch began with inputs of several plans; the layer sets it when a cache
            keeps the selection. A batch that began with one plan caches that plan's heads alone.
    """

    plan: Tensor
    whole: bool = True
    mixed: bool = False

    def moved(self, function: Callable[[Tensor], Tensor]) -> BankSelection:
        found = BankSelection(*super().moved(function))
        found.plan, found.whole, found.mixed = function(self.plan), self.whole, self.mixed
        return found

    def _replace(self, **changes: Any) -> BankSelection:
        """With other weights, as :func:`headwise.nn.scaled_heads` gives heads."""
        changed = super()._replace(**changes)
        changed.plan, changed.whole, changed.mixed = self.plan, False, self.mixed
        return changed


class _Packed(NamedTuple):
    """A layer with one plan's heads and projection, and the weights that it was made from."""

    layer: nn.Module
    made_from: tuple


class BankGate(ScopedGate, Gate, configured=True):
    """Runs for each input the heads of one of M plans, each with its own output projection.

    The gates of a model decide together, once for each input: the gate of the attention layer
    number ``at`` scores the plans by a linear function of its input (the mean, the first token or
    the maximum over tokens), and later layers follow; earlier layers run one plan for all inputs.
    :func:`headwise.pruning.fit_bank` creates such gates. Routing once, early, to one of a few
    masks: PuDDing (arXiv 2502.04348), IG-Pruning (arXiv 2511.02213).

    In evaluation a batch that follows one plan runs as a dense layer of that plan's heads, with
    weights packed once. In a batch of several plans each sequence runs the heads of its own, out of
    one layer that has the heads of all plans. With one plan the model computes the same as after
    :func:`headwise.prune` with ``repair``.

    Args:
        plans: the heads of this layer that each plan keeps, ascending.
        at: which of the model's attention layers decides, in their order.
        features: what it reads from its input, some of ``"mean"``, ``"first"`` and ``"max"``.
        names: what to call the plans; default: their numbers.
        scope: always ``"model"``.
        embed_dim: width of the layer's input, D.
        num_heads: heads of the layer, H.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Parameters ``weights.m [D, k_m d]`` and ``biases.m [D]``: the output projection of plan m.
    Buffers ``router_weight [M, F]``, ``router_bias [M]``, float32: the scores of the plans. All are
    set by :meth:`set_projection` and :meth:`set_router`.

    Raises:
        ValueError: no plans, a head outside ``0..H-1`` or plans that are not ascending, an unknown
            feature, or a wrong number of names.
    """

    #: Plans of the next inputs instead of the router's, int64 ``[>= B]``.
    forced: Tensor | None = None

    #: The output projection depends on the input: the layer calls :meth:`run` and :meth:`project`.
    projects = True
    scope = "model"

    _RECORDED = ("expected_heads", "_packed", "forced")

    def __init__(
        self,
        plans: Sequence[Sequence[int]],
        *,
        at: int = 0,
        features: Sequence[str] = ("mean",),
        names: Sequence[str] | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        plans = [_heads(plan) for plan in _listed("plans", plans)]
        features = _listed("features", features)
        names = [
            str(name) for name in (range(len(plans)) if names is None else _listed("names", names))
        ]
        if not plans:
            raise ValueError("plans must not be empty: a bank needs at least one plan")
        for heads in plans:
            if sorted(heads) != heads:
                raise ValueError(f"plans must be ascending heads, got {quoted(heads)}")
            if num_heads is not None and heads and heads[-1] >= num_heads:
                raise ValueError(f"plans must be of heads in 0..{num_heads - 1}, got {heads[-1]}")
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < _MOST_LAYERS:
            raise ValueError(f"at must be a number of an attention layer, got {quoted(at)}")
        for feature in features or [None]:
            if feature not in FEATURES or features.count(feature) > 1:
                raise ValueError(
                    f"features must be some of {', '.join(FEATURES)}, each once, "
                    f"got {quoted(features)}"
                )
        if len(names) != len(plans):
            raise ValueError(f"names must have one entry per plan ({len(plans)}), got {len(names)}")
        options = {"plans": plans, "at": at, "features": features, "names": names}
        super().__init__(
            options | {"execution": "selected"},
            embed_dim=embed_dim,
            num_heads=num_heads,
            device=device,
            dtype=dtype,
        )
        self._packed: dict[int | None, _Packed] | None = None

    def config(self) -> dict[str, Any]:
        return {k: v for k, v in super().config().items() if k != "execution"}

    def _build(self, device, dtype) -> None:
        count = len(self.plans)
        weight = torch.zeros(count, self.num_heads, dtype=dtype, device=device)
        for m, heads in enumerate(self.plans):
            weight[m, heads] = 1.0
        self.register_buffer("_weight", weight, persistent=False)  # [M, H]
        index, number = torch.ops.headwise.select_nonzero(weight)
        self.register_buffer("_index", index, persistent=False)  # int32 [M, H]
        self.register_buffer("_count", number, persistent=False)  # int32 [M]
        # Of the layer that has the heads of all plans, T of them: those of plan m are side by side.
        sizes = torch.tensor([len(heads) for heads in self.plans])
        merged = torch.eye(count).repeat_interleave(sizes, 1).to(weight)  # [M, T]
        self.register_buffer("_merged_weight", merged, persistent=False)
        index, number = torch.ops.headwise.select_nonzero(merged)
        self.register_buffer("_merged_index", index, persistent=False)  # int32 [M, T]
        self.register_buffer("_merged_count", number, persistent=False)  # int32 [M]
        width = len(self.features) * self.embed_dim
        like = {"device": device, "dtype": torch.float32}
        self.register_buffer("router_weight", torch.zeros(count, width, **like))
        self.register_buffer("router_bias", torch.zeros(count, **like))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()

    def fit_layer(self, layer: nn.Module) -> None:
        """Allocates the projections for the heads of ``layer``, initially with its weights."""
        if len(self.weights):
            return
        d, own = layer.head_dim, layer.output_projection
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for heads in self.plans:
            columns = [head * d + i for head in heads for i in range(d)]
            self.weights.append(nn.Parameter(own.weight.detach()[:, columns].clone()))
            bias = own.weight.new_zeros(self.embed_dim) if own.bias is None else own.bias
            self.biases.append(nn.Parameter(bias.detach().clone()))

    @torch.no_grad()
    def set_projection(self, plan: int, weight: Tensor, bias: Tensor | None) -> None:
        """The output projection of a plan: ``[D, k d]``, ``[D]``."""
        self.weights[plan].copy_(weight)
        if bias is not None:
            self.biases[plan].copy_(bias)

    @torch.no_grad()
    def set_router(self, weight: Tensor, bias: Tensor) -> None:
        """How plans are scored: ``[M, F]`` and ``[M]``; the highest score wins."""
        self.router_weight.copy_(weight)
        self.router_bias.copy_(bias)

    @property
    def how(self) -> str:  # type: ignore[override]
        if len(self.plans) == 1:
            return "A bank with one plan: the same heads run for every input."
        return (
            f"A bank of {len(self.plans)} plans: the input of attention layer {self.at} decides "
            "which plan the input follows from there on"
            + (", and layers before it run the same heads for every input." if self.at else ".")
        )

    def scope_key(self) -> str:
        return f"BankGate {len(self.plans)} {self.at} {self.features} {self.names}"

    def scores(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """float32 ``[B, M]``: the scores of the plans, of the deciding layer's input."""
        features = router_features(x, key_padding_mask, self.features)
        return features @ self.router_weight.T + self.router_bias

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        scope = self._joined()
        if self.at >= len(scope.gates):
            raise RuntimeError(
                f"BankGate must decide in one of the model's {len(scope.gates)} layers, got "
                f"at={self.at}: was its layer removed?"
            )
        plan = torch.zeros(x.size(0), dtype=torch.long, device=x.device)  # [B]
        if self._position == self.at and len(self.plans) > 1:
            if self.forced is None:
                plan = self.scores(x, key_padding_mask).argmax(1)
            else:
                plan = self.forced[: len(x)].to(x.device)
            scope.plan = plan
        elif self._position > self.at and len(self.plans) > 1:
            decided = scope.plan
            if decided is None or len(decided) != x.size(0):
                raise RuntimeError(
                    f"BankGate follows what layer {self.at} decided for each input, which has not "
                    f"run on this batch of {x.size(0)}: run the whole model"
                )
            plan = decided
        weight = self._weight.to(x.dtype).index_select(0, plan)  # [B, H]
        index, count = (t.index_select(0, plan) for t in (self._index, self._count))
        selection = BankSelection(index, count, weight)
        selection.plan = plan
        return selection

    def project(self, context: Tensor, selection: BankSelection) -> Tensor:
        """context ``[B, H, L, d]`` of all heads -> ``[B, L, D]``, each row by its plan."""
        if not selection.whole:
            context = context * selection.weight.to(context.dtype)[:, :, None, None]
        batch, _, length, _ = context.shape
        output = None
        for m, heads in enumerate(self.plans):
            rows = (selection.plan == m).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            own = context.index_select(0, rows)[:, heads].transpose(1, 2).flatten(2)
            y = nn.functional.linear(own, self.weights[m], self.biases[m])  # [b, L, D]
            if output is None:  # of autocast's dtype
                output = y.new_zeros(batch, length, self.embed_dim)
            output = output.index_copy(0, rows, y)
        return context.new_zeros(0, length, self.embed_dim) if output is None else output

    def groups(self, selection: BankSelection) -> list[tuple[int, Tensor | None]]:
        """The plans that occur in a batch, each with its rows; None: all of them."""
        found = selection.plan.unique().tolist() if len(self.plans) > 1 else [0]
        if len(found) == 1:
            return [(found[0], None)]
        return [(m, (selection.plan == m).nonzero()[:, 0]) for m in found]

    def can_pack(self, layer: nn.Module, selection: BankSelection) -> bool:
        """Whether plans may run as separate layers: all of their heads have weight one, and no
        gradient has to reach the weights."""
        if self.training or not selection.whole:
            return False
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in layer.parameters())

    def packed(self, layer: nn.Module, plan: int) -> nn.Module:
        """``layer`` with only the heads of ``plan`` and its projection; made when needed."""
        own = [self.weights[plan], self.biases[plan]]

        def pack() -> nn.Module:
            small = layer.pruned(LayerPlan("", self.num_heads, self.plans[plan]))
            linear = small.output_projection
            linear.weight = nn.Parameter(self.weights[plan].detach(), requires_grad=False)
            linear.bias = nn.Parameter(self.biases[plan].detach(), requires_grad=False)
            return small

        return self._made(plan, layer, own, pack)

    def merged(self, layer: nn.Module) -> nn.Module:
        """``layer`` with the heads of all plans, one plan after the other, and no bias in its
        output projection: each plan has its own. Made when needed."""
        smalls = [self.packed(layer, plan) for plan in range(len(self.plans))]
        return self._made(None, layer, [*self.weights], lambda: layer.with_heads_of(smalls))

    def merged_selection(self, selection: BankSelection) -> Selection:
        """``selection`` among the heads of :meth:`merged`."""
        own = (self._merged_index, self._merged_count, self._merged_weight)
        index, count, weight = (part.index_select(0, selection.plan) for part in own)
        return Selection(index, count, weight.to(selection.weight.dtype))

    def _made(
        self, key: int | None, layer: nn.Module, own: list[Tensor], make: Callable[[], nn.Module]
    ) -> nn.Module:
        """What was made for ``key`` from the weights of ``layer`` and ``own``, made again if they
        have changed since."""
        read = [p for name, p in layer.named_parameters() if not name.startswith("gate.")]
        made_from = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in (*read, *own))
        if self._packed is None:
            self._packed = {}
        held = self._packed.get(key)
        if held is None or held.made_from != made_from:
            with torch.no_grad():
                held = self._packed[key] = _Packed(make().eval(), made_from)
        return held.layer
