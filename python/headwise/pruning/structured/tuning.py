"""Rescales the remaining heads and neurons to compensate for the pruned ones: mask tuning of Kwon
et al. 2022, 3.4."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.gates.padding import is_padding
from headwise.nn.attention_layer import AttentionProbe
from headwise.nn.instrumenting import instrument
from headwise.nn.partial_forward import Stop, tokens_read
from headwise.pruning.structured.description import Structure, TransformerLayer
from headwise.pruning.structured.masks import StructureMasks

#: Batches for measuring the sensitivity of the stream's dimensions.
SENSITIVITY_BATCHES = 8
#: Ridges to try, as shares of the mean square of a unit's output.
DAMPS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


Values = tuple[dict[str, Tensor], dict[str, Tensor]]  # masks of heads and of neurons, by name


@dataclass
class Tuned:
    """The result of tuning.

    Attributes:
        blocks: for each block its name, the chosen ridge (None: no scales were better than 1), and
            what share of the untuned error on held-out batches is left.
        loss: mean loss on the held-out batches, untuned and tuned; None: nothing could be tuned.
        step: how far scales moved from 1 to the solutions; 0: no step clearly lowered that loss.
        skipped: why nothing could be tuned, or "".
    """

    blocks: list[dict[str, Any]] = field(default_factory=list)
    loss: tuple[float, float] | None = None
    step: float = 0.0
    skipped: str = ""


@dataclass
class _Calls:
    """How each batch calls the layers, and the state of teacher and student.

    ``read``: for each batch, the tokens of the last layer's output that the loss depends on.
    """

    args: list[tuple] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)  # [B, L, D], the layer's input
    student: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)  # bool [B, L]


class _Capture:
    """Intermediate results of one run of a layer."""

    def __init__(self) -> None:
        # Tensors, once the layer has run.
        self.context: Any = None  # [B, H, L, d]
        self.valid: Any = None  # bool [B, L]
        self.activations: Any = None  # [B, L, F]
        self.after_attention: Any = None  # [B, L, D], the residual stream
        self.after_ffn: Any = None
        self.output: Any = None  # [B, L, D], of the layer


@torch.no_grad()
def tune(
    model: nn.Module,
    found: Structure,
    masks: StructureMasks,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    teacher: StructureMasks,
    *,
    units: Collection[str],
    damp: float | None = None,
    max_scale: float = 10.0,
    released: bool = False,
) -> Tuned:
    """Scales the remaining units, layer by layer, to bring the residual stream near the teacher's.

    Least squares over one scale for each head, then for each neuron of a layer, ridge towards 1
    (``_C.ScaleSolver``); the layers before are already tuned. Padding does not count, and in the
    last layer only the tokens that the loss depends on count: a classifier's first. Dimensions of
    the stream are weighted by the sensitivity of the loss (root mean square of its gradient): in
    plain least squares the few dimensions of large values would decide.

    Every fourth batch is held out. It chooses the ridge of each block; if no ridge brings the
    block's output nearer to the teacher's, the block keeps scales 1. Nearer to the teacher need not
    be better at the task: in the end the model's loss on the held-out batches decides whether all
    scales go to the solutions, half or a quarter of the way, or stay 1 if no step lowers it by more
    than chance (paired, one-sided, 95%).

    Args:
        model: in evaluation mode, with gates and hooks that read ``masks``.
        masks: 1 for kept units, 0 for others; changed in place.
        batches: calibration data.
        loss_fn: ``(model, batch) -> loss``.
        teacher: masks of a larger model, of the same weights.
        units: names of the attention layers and networks that get scales.
        damp: the ridge; None: the best of :data:`DAMPS`, block by block.
        max_scale: solutions with a larger scale are not used.
        released: as in the authors' code: all batches and dimensions count alike, and the ridge is
            that of ``_C.ScaleSolver.solve_released``, with an intercept for heads; the heads of the
            first layer keep scales 1; a solution that fails or has too large a scale ends it.
    """
    if not found.layers:
        return Tuned(skipped="the model has no transformer layers that headwise knows")
    done = Tuned()
    untuned = (dict(masks.heads), dict(masks.neurons))
    held_out = [i for i in range(len(batches)) if i % 4 == 3] or [len(batches) - 1]
    before = None if released else _losses(model, batches, held_out, loss_fn)
    calls = _first_inputs(model, found.layers[0].module, batches, loss_fn)
    calls.read = _read_tokens(model, found.layers[-1].module, batches, loss_fn)
    if released:
        held_out, damps = [], None
        alike = torch.ones(())
        sensitivity = {layer.name: (alike, alike) for layer in found.layers}
    else:
        damps = DAMPS if damp is None else (damp,)
        some = [batch for i, batch in enumerate(batches) if i not in held_out] or list(batches)
        sensitivity = _sensitivity(model, found, some[:SENSITIVITY_BATCHES], loss_fn)
    for layer in found.layers:
        runner = _Runner(
            model, found, layer, masks, calls, layer is found.layers[-1], held_out,
            sensitivity[layer.name],
        )  # fmt: skip
        expected = [runner.run("teacher", i, teacher) for i in range(len(batches))]
        for capture in expected:
            capture.context = capture.activations = None  # the largest tensors, and not needed
        for name, tune_block in (
            (layer.attention, runner.tune_heads),
            (layer.ffn, runner.tune_neurons),
        ):
            if name not in units or (released and name == found.layers[0].attention):
                continue
            tuned = tune_block(expected, damps, max_scale)
            if tuned is None:
                done.skipped = (
                    f"the solution for '{name}' failed, or had a scale above {max_scale:g}"
                )
                done.step = 1.0
                return done
            done.blocks += tuned
        calls.student = [runner.run("student", i, masks).output for i in range(len(batches))]
        calls.teacher = [capture.output for capture in expected]
    if before is None:
        done.step = 1.0
        return done
    solved = (dict(masks.heads), dict(masks.neurons))
    done.loss = (before.mean().item(),) * 2
    for step in (1.0, 0.5, 0.25):
        masks.heads, masks.neurons = _between(untuned, solved, step)
        after = _losses(model, batches, held_out, loss_fn)
        if after.mean() < done.loss[1] and _is_better(before - after):
            done.loss, done.step = (done.loss[0], after.mean().item()), step
    masks.heads, masks.neurons = _between(untuned, solved, done.step)
    return done


def _is_better(gain: Tensor) -> bool:
    """Whether a mean gain [N] is above 0 by more than chance: one-sided, 95%."""
    error = gain.std() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return bool(gain.mean() > 1.645 * error)


def _between(one: Values, other: Values, step: float) -> Values:
    """The masks ``one`` + step * (``other`` - ``one``)."""
    heads, neurons = (
        {name: torch.lerp(mask, b[name], step) for name, mask in a.items()}
        for a, b in zip(one, other, strict=True)
    )
    return heads, neurons


def _losses(model: nn.Module, batches: Sequence[Any], chosen: list[int], loss_fn) -> Tensor:
    """float64 [N]: of each example, or of each batch if ``loss_fn`` gives means."""
    losses = [loss_fn(model, batches[i]).double().reshape(-1) for i in chosen]
    return torch.cat(losses).cpu()


def _sensitivity(
    model: nn.Module, found: Structure, batches: Sequence[Any], loss_fn
) -> dict[str, tuple[Tensor, Tensor]]:
    """The sensitivity of the loss to each dimension of the stream: root mean square gradients [D].

    Of each layer, by name, after attention and after the feed-forward network; their mean square is
    1.
    """
    sums: dict[tuple[str, int], Tensor] = {}

    def record(key: tuple[str, int], x: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            sums[key] = sums.get(key, 0.0) + gradient.double().square().sum((0, 1))

        x.register_hook(add)

    def start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: kwargs[first].detach().requires_grad_()}

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        first = found.layers[0].module
        hooks.enter_context(first.register_forward_pre_hook(start, with_kwargs=True))
        for layer in found.layers:
            points = [(name, i) for i, name in enumerate(layer.norms)]
            if layer.norm_first:  # a norm reads the stream after the previous block
                points = [(layer.norms[1], 0)]

                def after(module, args, output, name=layer.name) -> None:
                    record((name, 1), output[0] if isinstance(output, tuple) else output)

                hooks.enter_context(layer.module.register_forward_hook(after))
            for norm, i in points:

                def before(module, args, key=(layer.name, i)) -> None:
                    record(key, args[0])

                hooks.enter_context(model.get_submodule(norm).register_forward_pre_hook(before))
        for batch in batches:
            loss_fn(model, batch).sum().backward()
    return {
        layer.name: (_root(sums, layer.name, 0), _root(sums, layer.name, 1))
        for layer in found.layers
    }


def _root(sums: dict[tuple[str, int], Tensor], name: str, i: int) -> Tensor:
    total = sums[name, i]
    mean = total.mean()
    return torch.ones_like(total) if mean == 0 else (total / mean).sqrt()


def _read_tokens(
    model: nn.Module, last: nn.Module, batches: Sequence[Any], loss_fn
) -> list[Tensor]:
    """For each batch, bool [B, L]: tokens of the last layer's output that the loss has a gradient
    for."""

    def read_in(batch: Any) -> Tensor | None:
        return tokens_read(last, lambda: loss_fn(model, batch).mean())

    return [read for read in map(read_in, batches) if read is not None]


def _first_inputs(model: nn.Module, first: nn.Module, batches: Sequence[Any], loss_fn) -> _Calls:
    calls = _Calls()

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        args, kwargs = tuple(args), dict(kwargs)
        x = args[0] if args else kwargs.pop(next(iter(kwargs)))
        calls.args.append(args[1:])
        calls.kwargs.append(kwargs)
        calls.teacher.append(x)
        raise Stop

    with first.register_forward_pre_hook(stop, with_kwargs=True):
        for batch in batches:
            with contextlib.suppress(Stop):
                loss_fn(model, batch)
    calls.student = list(calls.teacher)
    return calls


class _Runner:
    """Runs one layer under the teacher's and the student's masks."""

    def __init__(
        self,
        model: nn.Module,
        found: Structure,
        layer: TransformerLayer,
        masks: StructureMasks,
        calls: _Calls,
        last: bool,
        held_out: list[int],
        sensitivity: tuple[Tensor, Tensor],
    ) -> None:
        self.layer, self.masks, self.calls = layer, masks, calls
        self.last, self.held_out = last, held_out
        self.sensitivity = sensitivity  # [D] after attention, [D] after the network
        self.attention: Any = found.attention[layer.attention]
        self.ffn = found.ffn[layer.ffn]
        self.norms = [model.get_submodule(name) for name in layer.norms]

    def run(self, who: str, i: int, values: StructureMasks) -> _Capture:
        """The layer on batch ``i``, under the masks ``values``."""
        own = (self.masks.heads, self.masks.neurons)
        x = getattr(self.calls, who)[i]
        self.masks.heads, self.masks.neurons = values.heads, values.neurons
        try:
            with self._capturing() as capture:
                output = self.layer.module(x, *self.calls.args[i], **self.calls.kwargs[i])
        finally:
            self.masks.heads, self.masks.neurons = own
        capture.output = output[0] if isinstance(output, tuple) else output
        if self.layer.norm_first:
            capture.after_ffn = capture.output
        return capture

    @contextlib.contextmanager
    def _capturing(self) -> Iterator[_Capture]:
        capture = _Capture()

        def probe(name: str, layer, seen: AttentionProbe) -> None:
            capture.context = seen.context
            if seen.query_padding_mask is None:
                batch, _, length, _ = seen.context.shape
                capture.valid = seen.context.new_ones(batch, length, dtype=torch.bool)
            else:
                capture.valid = ~is_padding(seen.query_padding_mask)

        def keep(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                setattr(capture, name, args[0])

            return hook

        # After attention, the stream is the input of the norm of attention or, with norms first, of
        # the feed-forward network's norm.
        points = ["after_attention", "after_ffn"]
        if self.layer.norm_first:
            points = ["", "after_attention"]
        with contextlib.ExitStack() as hooks:
            for norm, point in zip(self.norms, points, strict=True):
                if point:
                    hooks.enter_context(norm.register_forward_pre_hook(keep(point)))
            hooks.enter_context(self.ffn.second.register_forward_pre_hook(keep("activations")))
            hooks.enter_context(instrument(self.attention, evaluate=False)).probe(probe)
            yield capture

    def tune_heads(
        self, expected: list[_Capture], damps: Sequence[float] | None, max_scale: float
    ) -> list[dict[str, Any]] | None:
        name, size = self.layer.attention, self.attention.head_dim
        kept = self.masks.heads[name].nonzero()[:, 0]
        columns = (kept[:, None] * size + torch.arange(size)).flatten()

        def rows(own: _Capture, teacher: _Capture) -> tuple[Tensor, Tensor]:
            context = own.context.transpose(1, 2).flatten(2)[..., columns]  # [B, L, E]
            return context, teacher.after_attention - own.after_attention

        weight = self.attention.out_proj.weight[:, columns]
        # For the last layer's heads the authors count every token, for its neurons those that are
        # read.
        read = self.last and damps is not None
        solvers = self._equations(expected, weight, size, rows, self.sensitivity[0], read)
        return self._set(self.masks.heads, name, kept, solvers, damps, max_scale)

    def tune_neurons(
        self, expected: list[_Capture], damps: Sequence[float] | None, max_scale: float
    ) -> list[dict[str, Any]] | None:
        name = self.layer.ffn
        kept = self.masks.neurons[name].nonzero()[:, 0]

        def rows(own: _Capture, teacher: _Capture) -> tuple[Tensor, Tensor]:
            return own.activations[..., kept], teacher.after_ffn - own.after_ffn

        weight = self.ffn.second.weight[:, kept]
        solvers = self._equations(expected, weight, 1, rows, self.sensitivity[1], self.last)
        return self._set(self.masks.neurons, name, kept, solvers, damps, max_scale)

    def _equations(
        self,
        expected: list[_Capture],
        weight: Tensor,
        group: int,
        rows: Callable,
        sensitivity: Tensor,
        read: bool,
    ) -> tuple[_C.ScaleSolver, _C.ScaleSolver]:
        """Those of the batches to fit, and those of the held-out batches.

        Dimensions of the stream are weighted by ``sensitivity`` [D]; with ``read``, only the tokens
        that the loss depends on count.
        """
        factor = sensitivity.to(weight).expand(weight.size(0))  # [D]
        weight = factor[:, None] * weight
        fitted, held_out = _C.ScaleSolver(weight, group), _C.ScaleSolver(weight, group)
        if weight.size(1) == 0:
            return fitted, held_out
        for i, teacher in enumerate(expected):
            own = self.run("student", i, self.masks)
            valid = own.valid & self.calls.read[i] if read else own.valid  # [B, L]
            inputs, residual = rows(own, teacher)
            residual = factor * residual  # [B, L, D]
            if i in self.held_out:
                held_out.add(inputs[valid], residual[valid])
            if i not in self.held_out or len(expected) == 1:
                fitted.add(inputs[valid], residual[valid])
        return fitted, held_out

    def _set(
        self,
        values: dict[str, Tensor],
        name: str,
        kept: Tensor,
        solvers: tuple[_C.ScaleSolver, _C.ScaleSolver],
        damps: Sequence[float] | None,
        max_scale: float,
    ) -> list[dict[str, Any]] | None:
        """Writes the best solution to the mask, if one is better than none.

        Without ``damps``, that of the released code, even if it is worse; None if there is none.
        """
        if len(kept) == 0:
            return []
        fitted, held_out = solvers
        if damps is None:
            scale = fitted.solve_released(intercept=values is self.masks.heads)
            if scale is None or max(map(abs, scale)) > max_scale:
                return None
            return [self._put(values, name, kept, scale, 1.0, fitted)]
        untuned = held_out.error([1.0] * len(kept))
        best, best_error, best_damp = None, untuned, None
        for damp in damps:
            scale = fitted.solve(damp)
            if scale is None or max(map(abs, scale)) > max_scale:
                continue
            error = held_out.error(scale)
            if error < best_error:
                best, best_error, best_damp = scale, error, damp
        if best is None:
            return [{"name": name, "damp": None, "error_left": 1.0}]
        assert best_damp is not None
        return [self._put(values, name, kept, best, best_damp, held_out)]

    @staticmethod
    def _put(
        values: dict[str, Tensor],
        name: str,
        kept: Tensor,
        scale: list[float],
        damp: float,
        judge: _C.ScaleSolver,
    ) -> dict[str, Any]:
        tuned = values[name].clone()
        tuned[kept] = torch.tensor(scale, dtype=torch.float64).to(tuned)
        values[name] = tuned
        untuned = judge.error([1.0] * len(kept))
        left = judge.error(scale) / untuned if untuned > 0 else 1.0
        return {"name": name, "damp": damp, "error_left": left}
