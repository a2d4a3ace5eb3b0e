"""Repair: adjusts the remaining weights of a pruned model to compensate for the pruned ones,
without training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise import _C
from headwise.convert.conversion import converted
from headwise.gates.linears import check_read
from headwise.io.printable import layer_called
from headwise.io.progress import with_progress
from headwise.nn.batches import batch_list, batch_size, call_model
from headwise.nn.layers import attention_layers
from headwise.nn.proof import TOLERANCE, unchanged_on_error
from headwise.pruning.replay import Replay, Seen, Site
from headwise.pruning.structured.masks import masks_of

__all__ = ["RIDGES", "LayerRepair", "repair"]

#: Ridges that are tried, as shares of the mean variance of an input.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

#: One in this many sequences is held out, to choose the ridge.
HELD_OUT = 4

#: Ridges that hold the members' solution near that of all inputs.
_NEAR = (10.0, 100.0)

_Moments = tuple[_C.OutputMoments, _C.OutputMoments]


@dataclass(frozen=True)
class LayerRepair:
    """What :func:`repair` did to one output projection.

    Errors are mean squared distances to the dense layer's output, as shares of its variance, on
    held-out tokens: 0 is the dense layer, 1 a constant.

    Attributes:
        name: of the attention layer or the feed-forward network.
        tokens: number of tokens of the fit.
        ridge: the chosen one; None: none was better than the original weights.
        error_before: of the pruned layer.
        error_after: of the repaired layer.
    """

    name: str
    tokens: int
    ridge: float | None
    error_before: float
    error_after: float


def repair(
    model: nn.Module,
    batches: Iterable[Any],
    dense: nn.Module,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ridges: Sequence[float] = RIDGES,
    bias: bool = False,
    all_networks: bool = False,
    layers: Collection[str] | None = None,
    members: Tensor | None = None,
    progress: bool | None = None,
    verify: bool = True,
) -> list[LayerRepair]:
    """Adjusts the output projections of a pruned ``model`` to compensate for the pruned heads.

    Layer by layer in the order in which they run, the output projection and its bias become the
    ridge least squares solution that reproduces the output of the layer of ``dense`` from the
    remaining heads (or neurons):

    .. math:: \\min_{W, b} \\; E\\,|y - W x - b|^2 + \\lambda\\, s\\, |W - W_0|^2

    with y the output of the dense layer, x the input of the pruned layer's projection, whose
    earlier layers are already repaired, W_0 the pruned weights and s the mean variance of an
    element of x. So a layer also compensates for the remaining error of earlier layers. Least
    squares after structured pruning: OSSCAR (arXiv 2403.12983), ZipLM (2302.04089), SlimGPT
    (2412.18110); only moments are kept (float64, in C++: ``OutputMoments``), never the tokens.

    Every fourth sequence is held out to choose each layer's ridge; if no ridge brings a layer
    nearer to the dense layer, it keeps its weights. Padding does not count; in the last layer only
    the tokens count that the model's output depends on, such as a classifier's first.

    Attention of all kinds is repaired (grouped key/value heads, cross-attention, layers under a
    gate, a dynamic one too), and the feed-forward networks that :func:`headwise.pruning.structure`
    knows and that have fewer neurons than in ``dense``.

    Args:
        model: the pruned model, changed in place: of :func:`headwise.prune`,
            :func:`headwise.pruning.kwon_prune`, or with a mask or gates. Modules must have the same
            names as in ``dense``, and layers the same width.
        batches: calibration data, no labels needed: 512 texts suit half of the heads of
            MiniLM, and an eighth needs thousands. Each is an input of ``forward_fn``. All are kept
            in memory.
        dense: the model before pruning, unchanged; it need not be converted.
        forward_fn: ``(model, batch) -> output``; default: the model called with the batch, a
            mapping's items as keyword arguments, a tuple's as positional ones.
        ridges: the values of lambda to try.
        bias: add a bias to output projections without one (decoders).
        all_networks: repair the second linear layers of feed-forward networks that lost no neurons
            too: they compensate for what attention could not. Slower.
        layers: names of the attention layers and networks to repair; None: all.
        members: bool ``[N]``: the inputs that the model is for; None: all. A layer is first fitted
            to all inputs, then again to these, with the ridge around the first solution (W_0
            above). So few members are enough, and many dominate the fit.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.
        verify: check that no projection is further from the dense layer than it was over all
            tokens, and that each repaired layer, run on the last batch, gives the output of its new
            weights say.

    Returns:
        The repair of each layer, in order.

    Raises:
        ValueError: no batches, ``members`` that are not bool ``[N]`` or are empty, a mask on blocks
            or hidden dimensions, a layer of ``model`` that ``dense`` does not have or of another
            width, activations that are NaN or infinite, or a layer for which ``verify`` fails.
        TypeError: an output projection is wrapped.

    After any error ``model`` is restored.

    Warns:
        UserWarning: fewer tokens than a layer's projection has inputs: the ridge then holds it near
            the original weights.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to repair with")
    if not attention_layers(model):
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention: "
            f"call headwise.convert first"
        )
    masks = masks_of(model)
    if masks is not None and (
        masks.hidden is not None or any(float(scale) != 1 for scale in masks.blocks.values())
    ):
        raise ValueError(
            "model must not have blocks or hidden dimensions masked by a structure plan: prune it "
            "(headwise.prune), then repair the result"
        )
    forward_fn = call_model if forward_fn is None else forward_fn
    student = Replay(model, batches, forward_fn)
    teacher = Replay(converted(dense), batches, forward_fn)
    names = _names(student, teacher, all_networks)
    names = [name for name in names if layers is None or name in layers]
    if members is not None:
        members = _checked(members, student)
    done: list[LayerRepair] = []
    few: list[str] = []
    with _numbers_kept() as keep, unchanged_on_error(model), student.running(), teacher.running():
        for name in with_progress(names, "repairing", "layer", progress):
            catch_up(name, student, teacher)
            own, rest = output_moments(student, teacher, name, members)
            fits = [(own if rest is None else _merged(own, rest), ridges)]
            if rest is not None and own[0].tokens:
                fits.append((own, (*ridges, *_NEAR)))
            site = student.sites[name]
            for moments, tried in fits:
                before = keep(site.linear)
                found = _set(site, moments, tried, bias)
                if verify:
                    _check(student, site, moments, before)
            done.append(found)
            inputs = site.linear.weight.size(1)
            if found.tokens < inputs:
                few.append(f"{found.tokens} for {inputs} in {layer_called(name)}")
    if few:
        warnings.warn(
            f"batches have fewer tokens than the projections of {len(few)} of {len(done)} layers "
            f"have inputs ({few[0]}): the ridge holds those near their weights",
            stacklevel=2,
        )
    return done


@contextlib.contextmanager
def _numbers_kept() -> Iterator[Callable[[nn.Module], tuple[Tensor, Tensor | None]]]:
    """Restores, after an error, the linear layers that were passed to its function, which returns
    copies of weight and bias."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        own = [part for part in (linear.weight, linear.bias) if part is not None]
        copies = [part.detach().clone() for part in own]
        kept.extend(zip(own, copies, strict=True))
        return copies[0], copies[1] if len(copies) > 1 else None

    try:
        yield keep
    except BaseException:
        with torch.no_grad():
            for own, copied in reversed(kept):
                own.copy_(copied)
        raise


def _check(
    student: Replay,
    site: Site,
    moments: tuple[_C.OutputMoments, _C.OutputMoments],
    before: tuple[Tensor, Tensor | None],
) -> None:
    """The checks of :func:`repair` under ``verify``."""
    fit, held_out = moments
    if held_out is not fit:
        fit.merge(held_out)
    linear = site.linear
    own, new = fit.error(*before), fit.error(linear.weight, linear.bias)
    tolerance = TOLERANCE.get(linear.weight.dtype, 4e-2)
    if not new <= own + tolerance * (fit.variance() + own):
        raise ValueError(
            f"repair of {layer_called(site.name)} would take it further from the dense layer: its "
            f"mean squared distance is {own:.6g} before and {new:.6g} after; model is as it was"
        )
    for seen in student.run(site.name, len(student.batches) - 1):
        bias = None if linear.bias is None else linear.bias.double()
        expected = F.linear(seen.inputs.double(), linear.weight.double(), bias)
        apart = (seen.outputs.double() - expected).abs()
        if not apart.numel():
            continue
        # Under autocast a float32 layer writes in a lower precision.
        tolerance = max(tolerance, TOLERANCE.get(seen.outputs.dtype, 4e-2))
        scale = float(expected.abs().max())
        terms = F.linear(seen.inputs.double().abs(), linear.weight.double().abs())
        if not float(apart.max()) <= tolerance * max(scale, float(terms.max())):
            at = int(apart.nan_to_num(nan=float("inf")).argmax())
            raise ValueError(
                f"{layer_called(site.name)} does not write what its repaired weights say: an "
                f"output should be {float(expected.flatten()[at]):.6g} and is "
                f"{float(seen.outputs.flatten()[at]):.6g}; model is as it was"
            )


def _names(student: Replay, teacher: Replay, all_networks: bool) -> list[str]:
    """The sites to repair, in order."""
    names = []
    layers = attention_layers(student.model)
    for name, site in student.sites.items():
        if name not in teacher.sites:
            raise ValueError(
                f"dense must have the layers of model, but has no '{name}'; "
                f"it has {', '.join(map(repr, teacher.sites))}"
            )
        own, other = site.linear, teacher.sites[name].linear
        if own.weight.size(0) != other.weight.size(0):
            raise ValueError(
                f"{layer_called(name)} must be as wide in model as in dense, got "
                f"{own.weight.size(0)} and {other.weight.size(0)} dimensions"
            )
        gate = layers[name].gate if name in layers else None
        if gate is not None and gate.projects:
            raise ValueError(
                f"{layer_called(name)} has a {type(gate).__name__}, whose plans have "
                f"projections of their own: headwise.pruning.fit_bank repairs them"
            )
        if name in layers:
            check_read(f"output projection of {layer_called(name)}", own)
            names.append(name)
        elif all_networks or own.weight.size(1) < other.weight.size(1):
            names.append(name)
    return names


def catch_up(name: str, *replays: Replay) -> None:
    """Finishes the blocks before that of ``name``, so that they need not run again, if all replays
    have it in the same block."""
    blocks = {replay.block_of(name) for replay in replays}
    block = blocks.pop()
    if block is None or blocks:
        return
    for replay in replays:
        if block > replay.finished:
            replay.finish(block - 1)


def calibration_tokens(
    student: Replay, teacher: Replay, name: str
) -> Iterator[tuple[Seen, Seen, Tensor, int]]:
    """What the site ``name`` of both sees in each call; which tokens count ``[B, L]`` (not padding,
    and in the last block those that the output depends on); and the number of the first
    sequence."""
    last = student.blocks and student.block_of(name) == len(student.blocks) - 1
    first = 0
    for i in range(len(student.batches)):
        read = teacher.read_tokens(i) if last else None
        owns = student.run(name, i)
        wholes = owns if teacher is student else teacher.run(name, i)
        for seen, whole in zip(owns, wholes, strict=True):
            valid = seen.valid
            if read is not None and read.shape == valid.shape:
                valid = valid & read
            yield seen, whole, valid, first
        first += len(valid)


def output_moments(
    student: Replay, teacher: Replay, name: str, members: Tensor | None = None
) -> tuple[_Moments, _Moments | None]:
    """Of the inputs of the site of ``student`` and the outputs of that of ``teacher``: for the
    sequences to fit, and for the held-out ones; then the same for the inputs that are not in
    ``members``."""
    weight = student.sites[name].linear.weight

    def empty() -> _Moments:
        fit, held_out = (_C.OutputMoments(weight.size(1), weight.size(0)) for _ in range(2))
        return fit, held_out

    own, rest = empty(), None if members is None else empty()
    for seen, whole, valid, first in calibration_tokens(student, teacher, name):
        held = torch.arange(first, first + len(valid)) % HELD_OUT == HELD_OUT - 1
        parts = [(own[0], ~held), (own[1], held)]
        if rest is not None and members is not None:
            mine = members[first : first + len(valid)]
            parts = [(moments, rows & mine) for moments, rows in parts]
            parts += [(rest[0], ~held & ~mine), (rest[1], held & ~mine)]
        for moments, rows in parts:
            chosen = valid & rows.to(valid.device).view(-1, *[1] * (valid.dim() - 1))
            try:
                targets = whole.outputs.to(seen.inputs.device)
                moments.add(seen.inputs[chosen], targets[chosen])
            except ValueError as error:
                raise ValueError(f"activations of {layer_called(name)}: {error}") from None
    if sum(moments.tokens for moments in (*own, *(rest or ()))) == 0:
        raise ValueError(f"batches must have tokens that are not padding for {layer_called(name)}")
    if own[1].tokens == 0:
        own = own[0], own[0]  # one to three sequences
    return own, rest


def _checked(members: Tensor, student: Replay) -> Tensor:
    count = sum(batch_size(batch) for batch in student.batches)
    if members.dtype != torch.bool or members.shape != (count,) or not bool(members.any()):
        raise ValueError(
            f"members must be bool [N] with at least one of the {count} inputs, got "
            f"{members.dtype} of shape {tuple(members.shape)} with {int(members.sum())}"
        )
    return members.cpu()


def _merged(own: _Moments, rest: _Moments) -> _Moments:
    """Of everyone: ``rest`` with ``own`` in it."""
    for others, mine in zip(rest, own, strict=True):
        others.merge(mine)
    return rest


def _set(
    site: Site,
    moments: tuple[_C.OutputMoments, _C.OutputMoments],
    ridges: Sequence[float],
    add_bias: bool,
) -> LayerRepair:
    fit, held_out = moments
    linear = site.linear
    tokens = fit.tokens + (held_out.tokens if held_out is not fit else 0)
    start = linear.bias
    if start is not None and linear.weight.requires_grad and not start.requires_grad:
        start = None  # added by the conversion of a model without biases: it stays zero
    if start is None and add_bias:
        start = linear.weight.new_zeros(linear.weight.size(0))
    found = _C.repair_projection(fit, held_out, linear.weight, start, list(ridges))
    with torch.no_grad():
        linear.weight.copy_(found.weight)
        if found.bias is None:
            pass
        elif linear.bias is not None:
            linear.bias.copy_(found.bias)
        else:
            linear.bias = nn.Parameter(found.bias, requires_grad=linear.weight.requires_grad)
    size = found.variance or 1.0
    return LayerRepair(
        site.name, tokens, found.ridge, found.error_before / size, found.error_after / size
    )
