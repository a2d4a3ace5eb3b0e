"""Applying a plan to a model: for good (``prune``) or as a mask (``mask``)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates import FixedGate, TokenSelection
from headwise.io.printable import layer_called, quoted
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.batches import check_batches
from headwise.nn.gate_proof import layer_outputs
from headwise.nn.instrumenting import evaluating
from headwise.nn.layers import (
    attention_layers,
    carry_hooks,
    check_replaceable,
    replace_module,
)
from headwise.nn.proof import Proof, bare, kind_of, unchanged_on_error
from headwise.pruning.plans import HeadPlan, LayerPlan, plan
from headwise.pruning.reconstruction import repair as repair_model
from headwise.pruning.scores import HeadScores
from headwise.pruning.structured.compaction import check_plan, compact
from headwise.pruning.structured.description import structure
from headwise.pruning.structured.masks import (
    StructureGate,
    StructureMasks,
    attach,
    detach,
    has_gate,
)
from headwise.pruning.structured.plan import StructurePlan
from headwise.pruning.structured.proof import PlanProof

__all__ = ["mask", "plan_from_gates", "plan_from_use", "prune", "unmask"]

NOT_CONVERTED = "model ({}) has no headwise.MultiheadAttention: call headwise.convert first"

#: Metric of the plans of :func:`plan_from_use`, made from gates that choose for each input.
USE = "use"


def prune(
    model: nn.Module,
    plan: HeadPlan | StructurePlan | None = None,
    *,
    repair: Iterable[Any] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Removes the heads that ``plan`` drops from the weights of ``model``.

    A kept head's rows of the query, key and value projections and its columns of the output
    projection stay (with their biases), the columns multiplied by the head's scale; the rest is
    removed. The result computes the same as ``mask(model, plan)``, with physically smaller layers:
    ``num_heads`` is the number of remaining heads, down to 0 (the output is then the output bias);
    ``head_dim`` stays. Layers may keep different numbers of heads, and layers that the plan does
    not name are unchanged. Parameters of pruned layers are new: create the optimizer afterwards.

    A :class:`~headwise.pruning.StructurePlan` also removes neurons, whole blocks and hidden
    dimensions. A removed block leaves a layer without heads, or neurons, and without biases,
    and in a post-norm layer no layer norm after it; dimensions are removed from everything that
    reads or writes the residual stream.

    Args:
        model: a converted model. The gates of the layers that are pruned must choose the same heads
            for every input (:class:`~headwise.FixedGate`, a trained static
            :class:`~headwise.HardConcreteGate`), or the plan must come from their observed choices
            (:func:`plan_from_use`); the plan replaces them, as in :func:`mask`.
        plan: which heads of which layer stay, by the names of :func:`headwise.attention_layers`.
            None: the choice of the model's gates (:func:`plan_from_gates`), so that trained static
                gates are compacted in one call.
        repair: calibration batches, with which the remaining weights are adjusted to compensate for
            the pruned ones, without training: see :func:`headwise.repair`. None: no repair.
        forward_fn: runs the model on a batch for ``repair``: see :func:`headwise.repair`.
        inplace: change ``model`` itself instead of a copy.
        verify: run one layer of each kind that a :class:`~headwise.HeadPlan` prunes, masked and
            pruned, on a few made-up tokens; of a :class:`~headwise.pruning.StructurePlan` all
            layers, or the residual stream from end to end; and check ``repair``.

    Returns:
        The smaller model: a copy, or ``model`` (its replacement, if it is itself a layer).

    Raises:
        ValueError: the plan names a layer that does not exist or has another number of heads, or a
            layer it prunes has a gate that chooses for each input; or the pruned model does not
            compute the same as the masked one (``verify``). ``model`` is then unchanged.
        TypeError: ``plan`` is no plan, or a projection is wrapped. ``model`` is then unchanged.
    """
    if repair is not None:
        dense = copy.deepcopy(model) if inplace else model
        with unchanged_on_error(model):
            small = prune(model, plan, inplace=inplace, verify=verify)
            repair_model(small, repair, dense, forward_fn=forward_fn, verify=verify)
        return small
    if isinstance(plan, StructurePlan):
        return _prune_structure(model, plan, inplace, verify)
    plan = plan_from_gates(model) if plan is None else plan
    _check(model, plan)
    for name, layer in attention_layers(model).items():
        if plan.metric == USE or name not in _names(plan) or layer.gate is None:
            continue
        if layer.gate.static_weight() is None:
            raise ValueError(
                f"{layer_called(name)} has a {type(layer.gate).__name__}, which chooses among the "
                "heads it was trained with: remove it first (layer.set_gate(None)), or prune by "
                "a plan of its choices (headwise.pruning.plan_from_use)"
            )
    if not inplace:
        model = copy.deepcopy(model)
    layers = attention_layers(model)
    proved: set[Hashable] = set()
    with unchanged_on_error(model):
        for entry in plan.layers:
            layer = layers[entry.name]
            check_replaceable(layer)
            smaller = layer.pruned(entry)
            kind = (kind_of(layer), len(entry.heads))
            if verify and kind not in proved:
                proved.add(kind)
                masked = bare(layer)
                masked.set_gate(_as_gate(entry))
                proof = Proof.of(masked, entry.name, layer_outputs)
                if proof is not None:
                    proof.check(smaller)
            carry_hooks(layer, smaller)
            model = replace_module(model, layer, smaller)
    return model


def _as_gate(entry: LayerPlan) -> FixedGate:
    """The gate for ``entry``."""
    scale = [0.0] * entry.num_heads
    for head, value in zip(entry.heads, entry.scale, strict=True):
        scale[head] = value
    return FixedGate(scale=scale)


def mask(model: nn.Module, plan: HeadPlan | StructurePlan) -> nn.Module:
    """Masks ``model`` by ``plan`` with gates, in place: dropped heads are not computed, but kept.

    Every layer that the plan names gets a :class:`~headwise.FixedGate` with the plan's scales,
    which replaces its gate. With a :class:`~headwise.pruning.StructurePlan`, heads get a gate that
    belongs to the plan; everything else is computed and masked by hooks. It replaces an earlier
    structure plan; :func:`unmask` removes it.

    Returns:
        ``model``.

    Raises:
        TypeError: ``plan`` is no plan.
        ValueError: the plan names a layer that does not exist or has another number of heads.
            ``model`` is then unchanged.
    """
    if isinstance(plan, StructurePlan):
        check_plan(structure(model), plan)
        model = detach(model)
        masks = StructureMasks.from_plan(plan)
        return attach(model, structure(model), masks, hidden=plan.hidden is not None)
    _check(model, plan)
    layers = attention_layers(model)
    for entry in plan.layers:
        layer = layers[entry.name]
        layer.set_gate(_as_gate(entry).train(layer.training))
    return model


def plan_from_gates(model: nn.Module) -> HeadPlan:
    """The plan that is equivalent to the static gates of ``model`` in evaluation.

    A head's scale is its weight from the gate (of a trained hard-concrete gate, its value in (0,
    1]); heads of weight 0 are dropped. Layers without a gate are not in the plan. ``prune(model)``
    applies it.

    Raises:
        ValueError: no layer has a gate, or one has a gate whose choice depends on the input (see
            :func:`plan_from_use`).
    """
    entries = []
    for name, layer in attention_layers(model).items():
        if layer.gate is None:
            continue
        weight = layer.gate.static_weight()  # [H]
        if weight is None:
            raise ValueError(
                f"{layer_called(name)} has a {type(layer.gate).__name__}, whose choice depends on "
                "the input: no plan is equivalent to it (headwise.pruning.plan_from_use keeps the "
                "heads that it runs most often)"
            )
        weights = weight.double().tolist()
        heads = [head for head, value in enumerate(weights) if value != 0.0]
        scale = [weights[head] for head in heads]
        entries.append(LayerPlan(name, layer.num_heads, heads, scale))
    if not entries:
        raise ValueError("model must have gates to make a plan from, got none")
    return HeadPlan(entries, "gates")


@torch.no_grad()
def plan_from_use(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any],
    keep: float | None = None,
    progress: bool | None = None,
) -> HeadPlan:
    """The heads that the gates of ``model`` ran most often on some data: a smaller, static model
    from one with gates that choose for each input.

    No plan computes the same as such gates. This one keeps, in one ranking over all layers, the
    heads with the largest share of inputs (or tokens, if those choose) that ran them; a head's
    scale is its mean weight when it ran. Measure what that costs, or fine-tune afterwards.
    ``prune(model, plan)`` applies it and removes the gates.

    Args:
        model: a converted model with gates; runs in evaluation mode and is restored.
        batches: input of ``forward_fn``.
        forward_fn: ``(model, batch)`` runs the model; its result is not used.
        keep: the share of the gated layers' heads that stays, in (0, 1]; default: the mean share
            that ran.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        A plan with metric ``"use"`` for the layers with a gate.

    Raises:
        ValueError: no layer has a gate, ``batches`` are empty, or ``keep`` is out of range.
    """
    check_batches(batches)
    gated = [name for name, layer in attention_layers(model).items() if layer.gate is not None]
    if not gated:
        raise ValueError("model must have gates to make a plan from, got none")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in gated}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in attention_layers(model).items():
            if layer.gate is not None:
                stack.enter_context(_watching(layer, seen[name]))
        for batch in with_progress(batches, "use of heads", "batch", progress):
            forward_fn(model, batch)
    share, scale = {}, {}
    for name, calls in seen.items():
        if not calls:
            raise ValueError(
                f"batches must run every gated layer, got no run of {layer_called(name)}"
            )
        ran, weight = (torch.cat(parts) for parts in zip(*calls, strict=True))  # [N, H]
        share[name] = ran.mean(0)  # [H]
        scale[name] = (weight * ran).sum(0) / ran.sum(0).clamp(min=1)  # [H]
    if keep is None:
        keep = torch.cat(list(share.values())).mean().item()
        if keep == 0:
            raise ValueError("batches must run a head for a plan to keep, but every input ran none")
    chosen = plan(HeadScores("use", share), keep)
    entries = [
        LayerPlan(e.name, e.num_heads, e.heads, [scale[e.name][head].item() for head in e.heads])
        for e in chosen.layers
    ]
    return HeadPlan(entries, USE, {"keep": keep})


@contextlib.contextmanager
def _watching(layer: AttentionLayer, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Appends which heads run, and their weights, float64 ``[B, H]`` each, for every call; of a
    gate that chooses for every token ``[N, H]``, of the tokens that run a head."""

    def observe(layer, selection, x, padding) -> None:
        if isinstance(selection, TokenSelection):
            ran = selection.chosen[selection.chosen.any(-1)]  # [N, H]
            weight = selection.weight[selection.chosen.any(-1)]
            seen.append((ran.double().cpu(), weight.double().cpu()))
            return
        ran = torch.ops.headwise.selection_mask(selection.index, selection.count, torch.float64)
        seen.append((ran.cpu(), selection.weight.double().cpu()))

    layer._observers.append(observe)
    try:
        yield
    finally:
        layer._observers.remove(observe)


def unmask(model: nn.Module) -> nn.Module:
    """Removes the :class:`~headwise.pruning.StructurePlan` that :func:`mask` put on ``model``.

    Returns:
        ``model``, changed in place. Gates that the plan's gates replaced are not restored.
    """
    return detach(model)


def _prune_structure(
    model: nn.Module, plan: StructurePlan, inplace: bool, verify: bool
) -> nn.Module:
    found = structure(model)
    check_plan(found, plan)
    replaced = _names(plan.heads)  # layers whose gates the plan replaces
    cut = replaced | {block.name for block in plan.blocks}
    for name, layer in found.attention.items():
        if layer.gate is None or isinstance(layer.gate, StructureGate):
            continue
        if name in replaced and layer.gate.static_weight() is not None:
            continue
        if name in cut or plan.hidden is not None:
            raise has_gate(name, layer)
    if not inplace:
        model = copy.deepcopy(model)
    with unchanged_on_error(model):
        model = detach(model)
        proof = PlanProof(model, plan) if verify else None
        model = compact(model, plan)
        if proof is not None:
            proof.check(model)
    return model


def _names(plan: HeadPlan) -> set[str]:
    return {entry.name for entry in plan.layers}


def _check(model: nn.Module, plan: HeadPlan) -> None:
    layers = attention_layers(model)
    if not layers:
        raise ValueError(NOT_CONVERTED.format(type(model).__name__))
    if not isinstance(plan, HeadPlan):
        raise TypeError(
            "plan must be a headwise.HeadPlan (HeadPlan.load reads a file) or a "
            f"headwise.pruning.StructurePlan, got {quoted(plan)}"
        )
    for entry in plan.layers:
        if entry.name not in layers:
            raise ValueError(
                f"plan names {layer_called(entry.name)}, which model does not have; "
                f"it has {', '.join(map(repr, layers))}"
            )
        if entry.num_heads != layers[entry.name].num_heads:
            raise ValueError(
                f"plan has {entry.num_heads} heads for {layer_called(entry.name)}, "
                f"which has {layers[entry.name].num_heads} in model"
            )
