"""Banks: several plans for a model, each with its repair, and a router that picks one by the
input."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.conversion import converted
from headwise.gates import BankGate, link_gates
from headwise.gates.bank import FEATURES, router_features
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list, batch_size, call_model, check_batches, take_rows
from headwise.nn.instrumenting import evaluating
from headwise.nn.layers import attention_layers
from headwise.nn.partial_forward import Stop
from headwise.pruning.apply import prune
from headwise.pruning.plans import HeadPlan, LayerPlan, plan
from headwise.pruning.reconstruction import repair
from headwise.pruning.scores import HeadScores
from headwise.pruning.structured.masks import refuse_gates

__all__ = ["Bank", "PlanChoice", "fit_bank", "following", "plan_choices", "refit_router"]

#: Starts of k-means; the tightest clusters win.
_STARTS = 4
_ITERATIONS = 100
#: How many typical inputs represent a cluster.
_TYPICAL = 5


@dataclass(frozen=True)
class Bank:
    """The result of :func:`fit_bank`.

    Attributes:
        model: the model with a :class:`~headwise.gates.BankGate` in every attention layer.
        plans: the plan of each cluster.
        clusters: int64 ``[N]``: the cluster of each calibration input.
        routed: share of the calibration inputs that the router sends to their own cluster.
        typical: for each cluster, the numbers of the calibration inputs nearest to its centroid,
            nearest first: they show what the cluster has in common.
    """

    model: nn.Module
    plans: list[HeadPlan]
    clusters: Tensor
    routed: float
    typical: list[list[int]]


@dataclass(frozen=True)
class PlanChoice:
    """The plan of one input, and how clear the choice was.

    Attributes:
        plan: its number.
        name: its name.
        score: of the plan, by the router.
        next_plan: the second-best plan; None: the bank has one plan.
        margin: by how much the second plan's score is lower; 0 if there is none.
        heads: of each layer, by name, the heads that run.
        scores: of all plans, by the router.
    """

    plan: int
    name: str
    score: float
    next_plan: int | None
    margin: float
    heads: dict[str, list[int]]
    scores: list[float]


def fit_bank(
    model: nn.Module,
    batches: Iterable[Any],
    score_fn: Callable[[nn.Module, list[Any]], HeadScores],
    keep: float,
    plans: int | None = None,
    *,
    clusters: Sequence[int] | Tensor | None = None,
    names: Sequence[str] | None = None,
    at: int = 1,
    features: Sequence[str] = ("mean",),
    router: str = "centroid",
    repaired: bool = True,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Bank:
    """Several plans of one size for a model, and a router that picks one for each input.

    1. The inputs' features are read where the router will read them: the input of attention layer
       number ``at`` of the dense model, whose layers before it are pruned alike for all inputs.
    2. Unless ``clusters`` (tasks, domains) says which inputs belong together, k-means does.
    3. Each cluster gets the plan by its own inputs' scores, with the same total of heads, and its
       own repair (:func:`headwise.repair` with the cluster as its members).
    4. The router is the nearest centroid, or a linear softmax fitted to the clusters; it reads the
       output of the pruned layers before it.

    With ``plans=1`` the model computes what ``prune(model, plan, repair=batches)`` gives.

    Args:
        model: a converted or convertible model without gates, unchanged.
        batches: calibration data: mappings (or tuples, tensors) whose first dimension is inputs.
        score_fn: ``(model, batches) -> scores``, for example ``lambda model, batches:
            hw.score_heads(model, batches, loss_fn)["michel"]``.
        keep: the share of the heads that each plan keeps, in (0, 1].
        plans: number of plans; default: 4, or one for each cluster of ``clusters``, with which it
            must not be given.
        clusters: int ``[N]``: the cluster of each input, counted from 0, in the batches' order.
        names: names of the plans.
        at: the attention layer that decides; 0 reads the embeddings.
        features: what the router reads: some of ``"mean"``, ``"first"``, ``"max"`` over tokens.
        router: ``"centroid"`` or ``"softmax"``.
        repaired: repair each plan.
        forward_fn: as in :func:`headwise.repair`.
        seed: of k-means.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no batches, fewer inputs than plans, a cluster without members, ``at`` that
            leaves no layer, a layer that runs several times, a model with gates, or both ``plans``
            and ``clusters``.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to fit a bank on")
    if router not in ("centroid", "softmax"):
        raise ValueError(f"router must be 'centroid' or 'softmax', got {quoted(router)}")
    for feature in features:
        if feature not in FEATURES:
            raise ValueError(
                f"features must be some of {', '.join(FEATURES)}, got {quoted(feature)}"
            )
    forward_fn = forward_fn or call_model
    dense = converted(model)
    layers = attention_layers(dense)
    refuse_gates(dense)
    if not 0 <= at < len(layers):
        raise ValueError(f"at must be one of the {len(layers)} attention layers, got {at}")
    _check_calls(dense, batches[0], forward_fn)
    seen = _inputs_of(dense, list(layers)[at], batches, forward_fn, features)  # [N, F]
    where = _clusters(seen, plans, clusters, seed)
    count = int(where.max()) + 1
    sizes = torch.bincount(where, minlength=count)
    if bool((sizes == 0).any()):
        raise ValueError(f"cluster {int(sizes.argmin())} has no members: ask for fewer plans")

    whole = plan(score_fn(dense, batches), keep=keep)
    common = prune(dense, whole, repair=batches if repaired else None, forward_fn=forward_fn)
    # The router will read the output of pruned layers.
    seen = _inputs_of(common, list(layers)[at], batches, forward_fn, features)
    weight, bias = _router(seen, where, count, router)
    routed = (seen @ weight.T + bias).argmax(1) == where
    found, small = [], []
    for cluster in with_progress(range(count), "plans", "plan", progress):
        own = batches if count == 1 else _members(batches, where == cluster)
        chosen = whole if count == 1 else _plan_after(dense, whole, score_fn(dense, own), at)
        found.append(chosen)
        small.append(
            common
            if count == 1
            else _repaired(
                dense,
                chosen,
                common,
                batches if repaired else None,
                where == cluster,
                at,
                forward_fn,
            )
        )
    banked = _with_gates(copy.deepcopy(dense), found, small, at, features, names)
    gates: list[Any] = [layer.gate for layer in attention_layers(banked).values()]
    gates[at].set_router(weight.to(gates[at].router_weight), bias.to(gates[at].router_bias))
    return Bank(banked, found, where, routed.double().mean().item(), _typical(seen, where, count))


@torch.no_grad()
def refit_router(
    model: nn.Module,
    batches: Iterable[Any],
    clusters: Sequence[int] | Tensor,
    *,
    router: str = "softmax",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> float:
    """Fits the router of a bank again, in place, after the layers before it were trained.

    Training changes the output of these layers, and the router would send inputs to other plans
    than before. (With ``at=0`` and frozen embeddings nothing changes.)

    Args:
        model: a model with a bank.
        batches: calibration data.
        clusters: int ``[N]``: the plan of each input, for example ``Bank.clusters``.
        router, forward_fn: as in :func:`fit_bank`.

    Returns:
        The share of the inputs that the router now sends to their own plan.

    Raises:
        ValueError: no bank, no batches, or clusters that do not fit the inputs and the plans.
    """
    check_batches(batches)
    gate = _deciding(_gates(model))
    found: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(router_features(args[0], args[1], module.features))

    with gate.register_forward_hook(record), evaluating(model):
        for batch in batches:
            (forward_fn or call_model)(model, batch)
    if not found:
        raise ValueError("batches must not be empty: there is nothing to fit a router on")
    seen = torch.cat(found).double().cpu()
    where, count = _clusters(seen, None, clusters, 0), len(gate.plans)
    sizes = torch.bincount(where, minlength=count)
    if len(sizes) != count or bool((sizes == 0).any()):
        raise ValueError(f"clusters must have inputs of each of the {count} plans and no others")
    weight, bias = _router(seen, where, count, router)
    gate.set_router(weight.to(gate.router_weight), bias.to(gate.router_bias))
    return ((seen @ weight.T + bias).argmax(1) == where).double().mean().item()


@torch.no_grad()
def plan_choices(
    model: nn.Module, batch: Any, *, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> list[PlanChoice]:
    """Which plan of its bank ``model`` picks for each input of ``batch``, and how clearly.

    Raises:
        ValueError: the model has no bank.
    """
    gates = _gates(model)
    gate = _deciding(gates)
    scores: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        scores.append(module.scores(*args[:2]))

    with gate.register_forward_hook(record), evaluating(model):
        (forward_fn or call_model)(model, batch)
    choices = []
    for row in torch.cat(scores).double().cpu():
        order = row.argsort(descending=True).tolist()
        second = order[1] if len(order) > 1 else None
        margin = 0.0 if second is None else (row[order[0]] - row[second]).item()
        choices.append(
            PlanChoice(
                order[0],
                gate.names[order[0]],
                row[order[0]].item(),
                second,
                margin,
                {name: own.plans[order[0]] for name, own in gates.items()},
                row.tolist(),
            )
        )
    return choices


@contextlib.contextmanager
def following(model: nn.Module, plans: Tensor) -> Iterator[None]:
    """Makes the inputs of the next batches follow ``plans``, int ``[B]`` or longer, instead of the
    router.

    For controls: another input's plan, the plan of the true domain.
    """
    gate = _deciding(_gates(model))
    gate.forced = plans
    try:
        yield
    finally:
        gate.forced = None


def _gates(model: nn.Module) -> dict[str, BankGate]:
    """The gates of the model's bank, by layer."""
    layers = attention_layers(model)
    gates = {n: layer.gate for n, layer in layers.items() if isinstance(layer.gate, BankGate)}
    if not gates:
        kind = type(model).__name__
        raise ValueError(f"model ({kind}) has no bank: call headwise.pruning.fit_bank")
    return gates


def _deciding(gates: dict[str, BankGate]) -> BankGate:
    own = list(gates.values())
    return own[own[0].at]


# --- features and clusters ---


@torch.no_grad()
def _check_calls(dense: nn.Module, batch: Any, forward_fn: Callable) -> None:
    """Raises an error for layers that run several times: one plan cannot both follow a decision and
    precede it."""
    calls: Counter[str] = Counter()
    with contextlib.ExitStack() as hooks:
        for name, layer in attention_layers(dense).items():

            def count(module: nn.Module, args: tuple, name: str = name) -> None:
                calls[name] += 1

            hooks.enter_context(layer.register_forward_pre_hook(count))
        hooks.enter_context(evaluating(dense))
        forward_fn(dense, batch)
    for name, number in calls.items():
        if number > 1:
            raise ValueError(
                f"layers must run once for each input, and {layer_called(name)} ran {number} times"
            )


@torch.no_grad()
def _inputs_of(
    dense: nn.Module, name: str, batches: list[Any], forward_fn: Callable, features: Sequence[str]
) -> Tensor:
    """float64 [N, F]: what the router would read of each input."""
    found: list[Tensor] = []
    layer = attention_layers(dense)[name]
    prototype = _Reader(features, found)
    reader = prototype.bind(layer.embed_dim, layer.num_heads)
    reader.found = found
    layer.set_gate(reader)
    try:
        with evaluating(dense):
            for batch in batches:
                try:
                    forward_fn(dense, batch)
                except Stop:
                    continue
                raise ValueError(f"forward_fn must run model: {layer_called(name)} was not called")
    finally:
        layer.set_gate(None)
    return torch.cat(found).double().cpu()


class _Reader(BankGate, configured=False):
    """Replaces the deciding layer, reads its input, and ends the forward."""

    def __init__(self, features: Sequence[str], found: list | None = None, **binding: Any) -> None:
        super().__init__([[]], features=features, **binding)
        self.found = found

    def bind(self, embed_dim: int, num_heads: int, device=None, dtype=None) -> _Reader:
        return _Reader(self.features, embed_dim=embed_dim, num_heads=num_heads)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Any:
        assert self.found is not None
        self.found.append(router_features(x, key_padding_mask, self.features))
        raise Stop


def _clusters(
    seen: Tensor, plans: int | None, given: Sequence[int] | Tensor | None, seed: int
) -> Tensor:
    if given is not None:
        if plans is not None:
            raise ValueError(
                "plans and clusters must not both be given: there is one plan for each cluster, "
                f"got plans={quoted(plans)}"
            )
        where = torch.as_tensor(given, dtype=torch.long).cpu()
        if where.shape != (len(seen),) or bool((where < 0).any()):
            raise ValueError(
                f"clusters must be a number for each of the {len(seen)} inputs, counted from 0, "
                f"got shape {tuple(where.shape)}"
            )
        return where
    plans = 4 if plans is None else plans
    if isinstance(plans, bool) or not isinstance(plans, int) or plans < 1:
        raise ValueError(f"plans must be a positive number, got {quoted(plans)}")
    if plans > len(seen):
        raise ValueError(f"batches must have an input for each of {plans} plans, got {len(seen)}")
    return k_means(_standard(seen), plans, seed)[0]


def _standard(seen: Tensor) -> Tensor:
    return (seen - seen.mean(0)) / seen.std(0, correction=0).clamp(min=1e-9)


def k_means(x: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters [N] and centroids [count, F] of x [N, F]: Lloyd's algorithm from k-means++ starts
    (Arthur and Vassilvitskii 2007); of a few starts the least sum of squares."""
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(_STARTS if count > 1 else 1):
        centroids = x[torch.randint(len(x), (1,), generator=generator)]
        while len(centroids) < count:
            far = torch.cdist(x, centroids).square().amin(1)
            if float(far.sum()) == 0.0:
                raise ValueError(
                    f"batches must have at least {count} inputs that differ where the router "
                    f"reads them, got {len(centroids)}"
                )
            centroids = torch.cat([centroids, x[torch.multinomial(far, 1, generator=generator)]])
        where = torch.full((len(x),), -1)
        for _ in range(_ITERATIONS):
            distance = torch.cdist(x, centroids)
            nearest = distance.argmin(1)
            if torch.equal(nearest, where):
                break
            where = nearest
            for cluster in range(count):
                members = x[where == cluster]
                if len(members):
                    centroids[cluster] = members.mean(0)
                else:  # an empty cluster restarts at the farthest input
                    centroids[cluster] = x[distance.amin(1).argmax()]
        total = torch.cdist(x, centroids).amin(1).square().sum().item()
        if best is None or total < best[0]:
            best = (total, where, centroids)
    assert best is not None
    return best[1], best[2]


def _typical(seen: Tensor, where: Tensor, count: int) -> list[list[int]]:
    z = _standard(seen)
    found = []
    for cluster in range(count):
        members = (where == cluster).nonzero()[:, 0]
        distance = (z[members] - z[members].mean(0)).square().sum(1)
        found.append(members[distance.argsort(stable=True)][:_TYPICAL].tolist())
    return found


def _router(seen: Tensor, where: Tensor, count: int, kind: str) -> tuple[Tensor, Tensor]:
    """Scores of the plans as a linear function of the raw features: [M, F], [M]."""
    mean, scale = seen.mean(0), seen.std(0, correction=0).clamp(min=1e-9)
    z = (seen - mean) / scale
    if kind == "centroid":
        # The nearest centroid: |z - c|^2 / 2 = |z|^2 / 2 - (c z - |c|^2 / 2).
        weight = torch.stack([z[where == cluster].mean(0) for cluster in range(count)])
        bias = -weight.square().sum(1) / 2
    else:
        weight, bias = _softmax(z, where, count)
    weight = weight / scale
    return weight, bias - weight @ mean


def _softmax(z: Tensor, where: Tensor, count: int, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(count, z.size(1), dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=z.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(z @ weight.T + bias, where)
        value = value + ridge * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weight.detach(), bias.detach()


def _members(batches: list[Any], mine: Tensor) -> list[Any]:
    """The inputs of a cluster, batch by batch."""
    found, start = [], 0
    for batch in batches:
        size = batch_size(batch)
        rows = mine[start : start + size].nonzero()[:, 0]
        start += size
        if len(rows):
            found.append(take_rows(batch, rows))
    return found


# --- plans ---


def _plan_after(dense: nn.Module, whole: HeadPlan, scores: HeadScores, at: int) -> HeadPlan:
    """The plan of ``whole`` in the first ``at`` layers, and by ``scores`` in the others, with the
    same total of heads."""
    fixed = {entry.name: entry for entry in whole.layers[:at]}
    rest = {name: own for name, own in scores.values.items() if name not in fixed}
    left = whole.heads_kept - sum(len(entry.heads) for entry in fixed.values())
    total = sum(len(own) for own in rest.values())
    if left <= 0:
        entries = [LayerPlan(name, len(own), []) for name, own in rest.items()]
    else:
        entries = plan(HeadScores(scores.metric, rest), keep=left / total).layers
    return HeadPlan([*fixed.values(), *entries], scores.metric)


def _repaired(
    dense: nn.Module,
    chosen: HeadPlan,
    common: nn.Module,
    batches: list[Any] | None,
    members: Tensor,
    at: int,
    forward_fn: Callable,
) -> nn.Module:
    small = prune(dense, chosen)
    names = [entry.name for entry in chosen.layers]
    theirs, ours = attention_layers(common), attention_layers(small)
    for name in names[:at]:  # one repair for all inputs
        ours[name].load_state_dict(theirs[name].state_dict())
    if batches is not None:
        # As many others as members, spread over the data: they stabilise the fit at twice its cost.
        others = (~members).nonzero()[:, 0]
        step = max(1, len(others) // int(members.sum()))
        rows = members.clone()
        rows[others[::step]] = True
        repair(
            small,
            _members(batches, rows),
            dense,
            forward_fn=forward_fn,
            layers=names[at:],
            members=members[rows],
        )
    return small


def _with_gates(
    model: nn.Module,
    plans: list[HeadPlan],
    small: list[nn.Module],
    at: int,
    features: Sequence[str],
    names: Sequence[str] | None,
) -> nn.Module:
    kept = [{entry.name: entry.heads for entry in own.layers} for own in plans]
    for name, layer in attention_layers(model).items():
        gate = BankGate([own[name] for own in kept], at=at, features=features, names=names)
        bank = layer.bound(gate).train(layer.training)
        layer.set_gate(bank)
        for m, pruned in enumerate(small):
            linear = attention_layers(pruned)[name].output_projection
            bank.set_projection(m, linear.weight, linear.bias)
    return link_gates(model)
