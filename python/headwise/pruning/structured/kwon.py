"""Pruning without retraining, after Kwon et al. 2022 (arXiv 2204.09656)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.convert import convert
from headwise.gates.padding import is_padding
from headwise.io.printable import quoted
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list
from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers
from headwise.pruning.plans import HeadPlan, LayerPlan
from headwise.pruning.structured.compaction import compact
from headwise.pruning.structured.description import Structure, structure
from headwise.pruning.structured.latency import LatencyTable, measure_latency
from headwise.pruning.structured.masks import StructureMasks, attach, detach, refuse_gates, units
from headwise.pruning.structured.plan import FfnPlan, StructurePlan
from headwise.pruning.structured.tuning import tune as tune_masks

__all__ = ["KwonResult", "fisher_scores", "kwon_prune"]


class KwonResult(NamedTuple):
    """The result of :func:`kwon_prune`.

    Attributes:
        plan: the plan, with scales; its metadata records how it was found.
        model: the smaller model.
        report: seconds of each step, remaining shares of MACs (and time), results of tuning.
    """

    plan: StructurePlan
    model: nn.Module
    report: dict[str, Any]


def fisher_scores(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The Fisher information of every head's and neuron's mask: sum over batches of (dL/dm)^2.

    The objective of :func:`kwon_prune` (Kwon et al. 2022, section 3.2).

    Args:
        model: a converted or convertible model, unchanged. No gates.
        batches: input of ``loss_fn``.
        loss_fn: ``(model, batch) -> loss``, one loss per example or their mean.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        attention layer -> float64 ``[H]``, and feed-forward network -> float64 ``[F]``.

    Raises:
        ValueError: no batches, a loss that is not finite or does not depend on the masks, or a
            model with gates.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to calibrate on")
    search = _Search(_own_copy(model), heads=True, ffn=True)
    fisher, _ = search.fisher(batches, loss_fn, progress)
    found = {
        name: torch.tensor(fisher.scores(name), dtype=torch.float64)
        for name in (*search.heads, *search.neurons)
    }
    if not any(bool(scores.any()) for scores in found.values()):
        raise ValueError("scores must not all be 0: the loss does not depend on the units")
    return found


def kwon_prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    macs: float | None = None,
    latency: float | None = None,
    heads: bool = True,
    ffn: bool = True,
    rearrange: bool = True,
    tune: bool = True,
    tuning_batches: int = 32,
    damp: float | None = None,
    max_scale: float = 10.0,
    variant: str = "headwise",
    tokens: float | None = None,
    latency_table: LatencyTable | None = None,
    progress: bool | None = None,
) -> KwonResult:
    """Removes heads and neurons of a trained model under a limit of cost, without training.

    1. The Fisher information of every mask, sum over batches of (dL/dm)^2, weights frozen.
    2. A search for the masks that keep the most of it under the limit.
    3. Per layer, a rearrangement of the same number of units, by the layer's block of the Fisher
       matrix.
    4. Scales of the remaining units, by least squares against the masks of the milder limit
       sqrt(limit). They are folded into the weights. A quarter of the batches is held out of it: a
       block keeps scales 1 if tuning brings it no nearer to its target output on them, and the loss
       on them decides how far all scales go: all the way, half, a quarter, or not at all.

    The authors use 2,048 training examples in batches of 32.

    Args:
        model: a converted or convertible model, unchanged. No gates.
        batches: input of ``loss_fn``; all are kept in memory, and used more than once.
        loss_fn: ``(model, batch) -> loss``, one loss per example or their mean.
        macs: the limit as a share of the MACs of heads and neurons, in (0, 1]; or
        latency: the limit as a share of their measured time, in (0, 1].
        heads: whether heads may be pruned.
        ffn: whether neurons may be pruned.
        rearrange: do step 3.
        tune: do step 4.
        tuning_batches: how many batches step 4 uses; it holds their hidden states.
        damp: weight of the ridge that holds scales at 1, as a share of the mean square of a unit's
            output; None: for each block the best of a few, on held-out batches.
        max_scale: solutions of step 4 with a larger scale are not used.
        variant: step 4 as above, or "paper": as in the authors' code, which holds nothing out,
            weights all dimensions alike, regularises the normal equations with damp 1, fits an
            intercept next to the heads' scales, leaves the heads of the first layer alone and stops
            at the first solution that fails. ``damp`` must then not be given.
        tokens: length of a sequence, for counting MACs; default: the mean over ``batches``.
        latency_table: measured times; default: :func:`measure_latency` at the mean length.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        The plan, the smaller model and a report.

    Raises:
        ValueError: not exactly one limit, or one outside (0, 1] or that cannot be reached (the text
            names the nearest); no batches; a loss that is not finite or does not depend on the
            masks; a model with gates; a latency table of other layers.
    """
    share = _check_limit(macs, latency)
    if not (heads or ffn):
        raise ValueError("heads and ffn must not both be False: there is nothing to prune")
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to calibrate on")
    if tuning_batches <= 0:
        raise ValueError(f"tuning_batches must be positive, got {tuning_batches}")
    if variant not in ("headwise", "paper"):
        raise ValueError(f"variant must be 'headwise' or 'paper', got {quoted(variant)}")
    if damp is not None and not 0.0 <= damp < math.inf:
        raise ValueError(f"damp must be finite and not negative, got {damp}")
    if damp is not None and (variant == "paper" or not tune):
        why = "variant='paper', whose damp is 1" if tune else "tune=False, which tunes no scales"
        raise ValueError(f"damp must not be given with {why}, got {damp}")
    if latency_table is not None and latency is None:
        raise ValueError("latency_table must be given with latency, not with macs")
    model = _own_copy(model)
    clock = _Clock()
    search = _Search(model, heads, ffn)
    if latency is not None and latency_table is not None:
        latency_table.check(search.found)
    fisher, length = search.fisher(batches, loss_fn, progress)
    clock.lap("fisher_s")
    tokens = length if tokens is None else float(tokens)
    if latency is not None and latency_table is None:
        latency_table = measure_latency(model, length=max(1, round(tokens)), progress=progress)
        clock.lap("latency_table_s")
    table = latency_table if latency is not None else None
    kept = search.kept(fisher, share, tokens, table)
    if rearrange:
        kept = search.rearranged(fisher, kept)
    clock.lap("search_s")
    masks = search.masks
    search.put(masks, kept)
    report: dict[str, Any] = {"examples_tokens": length, "tokens": tokens}
    if tune:
        teacher = StructureMasks()
        milder = search.kept(fisher, math.sqrt(share), tokens, table)
        search.put(teacher, milder)
        part = batches[:tuning_batches]
        tuned = tune_masks(
            model,
            search.found,
            masks,
            part,
            loss_fn,
            teacher,
            units={*search.heads, *search.neurons},
            damp=damp,
            max_scale=max_scale,
            released=variant == "paper",
        )
        report |= {
            "tuned_blocks": sum(block["damp"] is not None for block in tuned.blocks),
            "tuning": tuned.blocks,
            "tuning_loss": tuned.loss,
            "tuning_step": tuned.step,
            "tuning_skipped": tuned.skipped,
        }
        clock.lap("tuning_s")
    limit = {"macs": macs} if macs is not None else {"latency": latency}
    metadata: dict[str, Any] = {
        "method": "kwon",
        **limit,
        "tokens": tokens,
        "rearrange": rearrange,
        "tune": tune,
    }
    if tune:
        metadata["variant"] = variant
    if table is not None:
        metadata["latency_table"] = table.to_dict()
    before = search.found.macs(tokens)
    plan = search.plan(masks, metadata)
    model = compact(detach(model), plan)
    search.restore(model)
    clock.lap("compaction_s")
    report |= {"macs": structure(model).macs(tokens) / before, **clock.laps}
    if table is not None:
        report["latency"] = search.seconds(plan, table) / search.seconds(None, table)
    return KwonResult(plan, model, report)


def _check_limit(macs: float | None, latency: float | None) -> float:
    share = latency if macs is None else macs
    if share is None or (macs is not None and latency is not None):
        raise ValueError(f"give one of macs and latency, got macs={macs} and latency={latency}")
    name = "latency" if macs is None else "macs"
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share}")
    return share


def _own_copy(model: nn.Module) -> nn.Module:
    """A converted copy; raises an error for gates and masks."""
    is_converted = bool(attention_layers(model))
    refuse_gates(model)
    model = copy.deepcopy(model)
    return model if is_converted else convert(model)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


Kept = tuple[dict[str, list[int]], dict[str, list[int]]]  # heads and neurons, by name


class _Search:
    """The masks of one model during the search."""

    def __init__(self, model: nn.Module, heads: bool, ffn: bool) -> None:
        self.model, self.masks = model, StructureMasks()
        self.found: Structure = structure(model)
        self.heads = {n: count for n, count in self.found.heads.items() if heads and count}
        self.neurons = {n: count for n, count in self.found.neurons.items() if ffn and count}
        if not self.heads and not self.neurons:
            what = " or ".join(["heads"] * heads + ["known feed-forward networks"] * ffn)
            raise ValueError(f"model ({type(model).__name__}) has no {what} to prune")
        sizes = {(a.embed_dim, a.head_dim) for a in self.found.attention.values()}
        widths = {f.first.in_features for f in self.found.ffn.values()}
        if len(sizes) > 1 or len(widths) > 1:
            raise ValueError(
                "layers of model must agree in width and head width, since the search counts all "
                f"heads, and all neurons, alike; got {sorted(sizes)} and {sorted(widths)}"
            )
        self._trained = {n: p.requires_grad for n, p in model.named_parameters()}
        self._modes = {n: module.training for n, module in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Gives ``model``, of the same names, the modes and frozen parameters of the original."""
        for name, module in model.named_modules():
            module.training = self._modes.get(name, module.training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._trained.get(name, True))

    def fisher(
        self, batches: Sequence[Any], loss_fn: Callable, progress: bool | None
    ) -> tuple[_C.FisherAccumulator, float]:
        """Gradients of all masks, and the mean number of tokens of a sequence."""
        self.model.eval().requires_grad_(False)
        leaves = {
            name: torch.ones(count, requires_grad=True)
            for name, count in {**self.heads, **self.neurons}.items()
        }
        # Gates on all heads, pruned or not: they see the padding.
        self.masks.heads = {
            name: leaves.get(name, torch.ones(count))
            for name, count in self.found.heads.items()
            if count
        }
        self.masks.neurons = {name: leaves[name] for name in self.neurons}
        attach(self.model, self.found, self.masks, hidden=False)
        lengths: list[Tensor] = []

        def observe(name: str, layer, selection, x: Tensor, padding: Tensor | None) -> None:
            if name != first:
                return
            if padding is None:
                lengths.append(torch.full((x.size(0),), float(x.size(1))))
            else:
                lengths.append((~is_padding(padding)).sum(1).float().cpu())

        first = next(iter(self.masks.heads))
        accumulator = _C.FisherAccumulator()
        with instrument(self.model) as opened:
            opened.observe(observe)
            for batch in with_progress(batches, "calibrating", "batch", progress):
                loss = _mean_loss(loss_fn(self.model, batch))
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                    gradient = torch.zeros_like(leaf) if gradient is None else gradient
                    accumulator.add(name, gradient)
        if not lengths:
            raise ValueError("loss_fn must run model: none of its attention layers was called")
        return accumulator, torch.cat(lengths).mean().item()

    def kept(
        self,
        fisher: _C.FisherAccumulator,
        share: float,
        tokens: float,
        table: LatencyTable | None,
    ) -> Kept:
        """The units that remain under a limit of ``share``."""
        head_scores = [fisher.scores(name) for name in self.heads]
        neuron_scores = [fisher.scores(name) for name in self.neurons]
        attention = next(iter(self.found.attention.values()))
        head_cost = _C.head_macs(tokens, attention.embed_dim, attention.head_dim)
        neuron_cost = _C.neuron_macs(tokens, attention.embed_dim)
        if table is None:
            whole = self.found.macs(tokens)
            fixed = whole - head_cost * sum(self.heads.values())
            fixed -= neuron_cost * sum(self.neurons.values())
            limit = share * whole - fixed
            if limit < -1e-9 * whole:
                raise ValueError(
                    f"macs={share:.6g} cannot be reached: what may not be pruned takes "
                    f"{fixed / whole:.4f} of the MACs, so the nearest is macs={fixed / whole:.4f}"
                )
            result = _C.search_macs(
                head_scores, neuron_scores, head_cost, neuron_cost, max(limit, 0.0)
            )
        else:
            whole = self.seconds(None, table)
            # One layer of each kind stays, at least.
            least = table.head_fit.base if self.heads else 0.0
            least += table.neuron_fit.base if self.neurons else 0.0
            fixed = whole - self._prunable_seconds(table)
            limit = share * whole - fixed
            if limit < least:
                nearest = (fixed + least) / whole
                raise ValueError(
                    f"latency={share:.6g} cannot be reached: with one layer of each kind the model "
                    f"takes {nearest:.4f} of the time, so the nearest is latency={nearest:.4f}"
                )
            result = _C.search_latency(
                head_scores, neuron_scores, table.head_fit, table.neuron_fit, limit
            )
        return (
            dict(zip(self.heads, result.heads, strict=True)),
            dict(zip(self.neurons, result.neurons, strict=True)),
        )

    def _prunable_seconds(self, table: LatencyTable) -> float:
        heads, neurons = table.head_fit, table.neuron_fit
        return sum(map(heads.seconds, self.heads.values())) + sum(
            map(neurons.seconds, self.neurons.values())
        )

    def seconds(self, plan: StructurePlan | None, table: LatencyTable) -> float:
        """The time of all layers, or of those that ``plan`` leaves, by the table's fits."""
        heads, neurons = dict(self.found.heads), dict(self.found.neurons)
        if plan is not None:
            heads |= {entry.name: len(entry.heads) for entry in plan.heads.layers}
            neurons |= {entry.name: len(entry.neurons) for entry in plan.ffn}
        return sum(map(table.head_fit.seconds, heads.values())) + sum(
            map(table.neuron_fit.seconds, neurons.values())
        )

    def rearranged(self, fisher: _C.FisherAccumulator, kept: Kept) -> Kept:
        heads, neurons = (
            {name: _C.rearrange(fisher.gradients(name), units) for name, units in kind.items()}
            for kind in kept
        )
        return heads, neurons

    def put(self, masks: StructureMasks, kept: Kept) -> None:
        """Sets ``masks`` to 1 for kept units and 0 for the rest."""
        masks.heads = {n: torch.ones(count) for n, count in self.found.heads.items() if count}
        masks.neurons = {}
        for values, kind, counts in (
            (masks.heads, kept[0], self.heads),
            (masks.neurons, kept[1], self.neurons),
        ):
            for name, own in kind.items():
                values[name] = torch.zeros(counts[name])
                values[name][own] = 1.0

    def plan(self, masks: StructureMasks, metadata: dict[str, Any]) -> StructurePlan:
        layers = [
            LayerPlan(name, count, *units(masks.heads[name])) for name, count in self.heads.items()
        ]
        networks = [
            FfnPlan(name, count, *units(masks.neurons[name]))
            for name, count in self.neurons.items()
        ]
        return StructurePlan(HeadPlan(layers, "kwon"), networks, metadata=metadata)


def _mean_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 1 or not loss.is_floating_point():
        raise ValueError(
            "loss_fn must return a floating tensor, one loss per example [B] or their mean, got "
            + (f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss))
        )
    if not torch.isfinite(loss).all():
        raise ValueError("loss_fn must return a finite loss, got NaN or infinity")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on model's output")
    return loss.mean()
