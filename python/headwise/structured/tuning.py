"""Scales of what stays, that make up for what went: mask tuning of Kwon et al. 2022, 3.4."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.multihead_attention import AttentionProbe, MultiheadAttention
from headwise.structured.description import Structure, TransformerLayer
from headwise.structured.masks import StructureMasks


@dataclass
class Tuned:
    """What tuning did: how many blocks have scales now, and why it stopped where it did."""

    blocks: int = 0
    stopped: str = ""


class _FirstLayer(Exception):
    """Raised when a forward has come to the first layer: what comes after is not needed."""


@dataclass
class _Calls:
    """How each batch calls the layers, and where it stands: teacher and student apart."""

    args: list[tuple] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)  # [B, L, D], the layer's input
    student: list[Tensor] = field(default_factory=list)


class _Capture:
    """What one run of a layer computed on the way."""

    def __init__(self) -> None:
        self.context: Tensor | None = None  # [B, H, L, d]
        self.valid: Tensor | None = None  # bool [B, L]
        self.activations: Tensor | None = None  # [B, L, F]
        self.after_attention: Tensor | None = None  # [B, L, D], the residual stream
        self.after_ffn: Tensor | None = None
        self.output: Tensor | None = None  # [B, L, D], of the layer


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
    damp: float = 1.0,
    max_scale: float = 10.0,
) -> Tuned:
    """Scales what stays, layer by layer, so that the residual stream comes near the teacher's.

    Least squares over one scale for each head, then for each neuron of a layer, ridge towards 1
    (``_C.ScaleSolver``); the layers before are already tuned. Tokens that are padding do not count.

    Args:
        model: in evaluation mode, with gates and hooks that read ``masks``.
        masks: 1 where a unit stays, 0 where it does not; changed.
        batches: calibration data.
        loss_fn: only to call the model.
        teacher: masks of a larger model, of the same weights.
        units: names of the attention layers and networks that get scales.
        damp: weight of the ridge.
        max_scale: tuning stops for good where a scale is larger.
    """
    done = Tuned()
    if not found.layers:
        done.stopped = "the model has no transformer layers that headwise knows"
        return done
    calls = _first_inputs(model, found.layers[0].module, batches, loss_fn)
    for layer in found.layers:
        runner = _Runner(model, found, layer, masks, calls)
        expected = [runner.run("teacher", i, teacher) for i in range(len(batches))]
        for name, tune_block in (
            (layer.attention, runner.tune_heads),
            (layer.ffn, runner.tune_neurons),
        ):
            if name not in units:
                continue
            done.stopped = tune_block(expected, damp, max_scale)
            if done.stopped:
                return done
            done.blocks += 1
        calls.student = [runner.run("student", i, masks).output for i in range(len(batches))]
        calls.teacher = [capture.output for capture in expected]
    return done


def _first_inputs(model: nn.Module, first: nn.Module, batches: Sequence[Any], loss_fn) -> _Calls:
    calls = _Calls()

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        args, kwargs = tuple(args), dict(kwargs)
        x = args[0] if args else kwargs.pop(next(iter(kwargs)))
        calls.args.append(args[1:])
        calls.kwargs.append(kwargs)
        calls.teacher.append(x)
        raise _FirstLayer

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(_FirstLayer):
                loss_fn(model, batch)
    finally:
        handle.remove()
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
    ) -> None:
        self.layer, self.masks, self.calls = layer, masks, calls
        self.attention: MultiheadAttention = found.attention[layer.attention]
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

        def probe(layer: MultiheadAttention, seen: AttentionProbe) -> None:
            capture.context = seen.context
            padding = seen.query_padding_mask
            if padding is None:
                batch, _, length, _ = seen.context.shape
                capture.valid = seen.context.new_ones(batch, length, dtype=torch.bool)
            else:
                capture.valid = ~padding if padding.dtype == torch.bool else padding == 0

        def keep(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                setattr(capture, name, args[0])

            return hook

        # After attention the stream is what the norm of attention sees, or, where norms come first,
        # that of the feed-forward network.
        points = ["after_attention", "after_ffn"]
        if self.layer.norm_first:
            points = ["", "after_attention"]
        handles = [
            norm.register_forward_pre_hook(keep(point))
            for norm, point in zip(self.norms, points, strict=True)
            if point
        ]
        handles.append(self.ffn.second.register_forward_pre_hook(keep("activations")))
        before = self.attention._probe
        self.attention._probe = probe
        try:
            yield capture
        finally:
            self.attention._probe = before
            for handle in handles:
                handle.remove()

    def tune_heads(self, expected: list[_Capture], damp: float, max_scale: float) -> str:
        name, size = self.layer.attention, self.attention.head_dim
        kept = self.masks.heads[name].nonzero()[:, 0]
        if len(kept) == 0:
            return ""
        columns = (kept[:, None] * size + torch.arange(size)).flatten()
        solver = _C.ScaleSolver(self.attention.out_proj.weight[:, columns], size)
        for i, teacher in enumerate(expected):
            own = self.run("student", i, self.masks)
            rows = own.context.transpose(1, 2).flatten(2)[own.valid][:, columns]  # [T, E]
            residual = teacher.after_attention - own.after_attention  # [B, L, D]
            solver.add(rows, residual[own.valid])
        return self._set(self.masks.heads, name, kept, solver, damp, max_scale)

    def tune_neurons(self, expected: list[_Capture], damp: float, max_scale: float) -> str:
        name = self.layer.ffn
        kept = self.masks.neurons[name].nonzero()[:, 0]
        if len(kept) == 0:
            return ""
        solver = _C.ScaleSolver(self.ffn.second.weight[:, kept], 1)
        for i, teacher in enumerate(expected):
            own = self.run("student", i, self.masks)
            residual = teacher.after_ffn - own.after_ffn  # [B, L, D]
            solver.add(own.activations[own.valid][:, kept], residual[own.valid])
        return self._set(self.masks.neurons, name, kept, solver, damp, max_scale)

    def _set(
        self,
        values: dict[str, Tensor],
        name: str,
        kept: Tensor,
        solver: _C.ScaleSolver,
        damp: float,
        max_scale: float,
    ) -> str:
        """Puts the solution into the mask, or returns why there is none."""
        scale = solver.solve(damp)
        if scale is None:
            return f"the equations of '{name}' have no finite solution"
        largest = max(abs(value) for value in scale)
        if largest > max_scale:
            return f"a scale of '{name}' would be {largest:.3g}, more than {max_scale:g}"
        tuned = values[name].clone()
        tuned[kept] = torch.tensor(scale, dtype=torch.float64).to(tuned)
        values[name] = tuned
        return ""
