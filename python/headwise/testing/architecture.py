"""The requirements on every converted architecture."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert import Architecture, convert
from headwise.gates import FixedGate
from headwise.io.printable import layer_called
from headwise.nn.batches import run_model
from headwise.nn.layers import attention_layers
from headwise.pruning import HeadPlan, LayerPlan, mask, prune
from headwise.serialization import load, save
from headwise.testing.comparing import equal, holds

#: A head must change the output by at least this when dropped.
LEAST_CHANGE = 1e-4


def check_architecture(
    model: nn.Module,
    batch: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Tensor] = run_model,
    prompt: Tensor | None = None,
    tolerance: float = 1e-5,
    adapters: Mapping[type, Architecture] | None = None,
) -> None:
    """Checks a model's conversion in the same way as the library's tests check its own.

    - the converted model's outputs equal the original's, with and without gradients, without a
      gate and with one that runs every head;
    - the gradients of the parameters that both have are equal;
    - dropping any one head changes the output: no mask is ignored, no head is missed;
    - removing heads from the weights (:func:`headwise.prune`) equals masking them
      (:func:`headwise.mask`);
    - a deep copy, and a saved and loaded model, compute the same;
    - with ``prompt``: both models generate the same tokens, with a cache.

    Args:
        model: not converted, small (two layers, a width of 24), with random weights that are not
            small: with weights near zero no head matters. It is not changed.
        batch: input of ``forward_fn``; include padding of different lengths.
        forward_fn: ``(model, batch) -> output``, without the rows of padding, because outputs may
            differ there. Default: ``model(**batch)`` for mappings, ``model(*batch)`` for tuples and
            lists, else ``model(batch)``; its ``logits`` if the result has them.
        prompt: int64 ``[B, L]`` for ``model.generate``, for decoders of transformers.
        tolerance: relative and absolute, of outputs; that of gradients is ten times larger.
        adapters: of :func:`headwise.convert`.

    Raises:
        AssertionError: one of these checks fails; the sentence names it.
        ValueError: :func:`headwise.convert` does not support the model.
    """
    model = copy.deepcopy(model).eval()

    def converting(gate: FixedGate | None = None) -> nn.Module:
        return convert(copy.deepcopy(model), gate, adapters=adapters)

    converted, gated = converting(), converting(FixedGate())
    holds(bool(attention_layers(gated)), "the converted model has no attention layers")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = forward_fn(model, batch)
            for what, own in (("converted model", converted), ("model with a gate", gated)):
                equal(f"the output of the {what}", forward_fn(own, batch), expected, tolerance)
    _check_gradients(model, batch, forward_fn, 10 * tolerance, adapters)
    _check_every_head(gated, batch, forward_fn)
    _check_pruning(converted, batch, forward_fn, tolerance)
    _check_copies(model, batch, forward_fn, adapters)
    if prompt is not None:
        options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
        tokens = [own.generate(prompt, **options) for own in (model, gated)]
        equal("the tokens that are generated with a cache", tokens[1], tokens[0])


def _check_gradients(
    model: nn.Module,
    batch: Any,
    forward_fn: Callable,
    tolerance: float,
    adapters: Mapping[type, Architecture] | None,
) -> None:
    """Compares the gradients of the parameters that conversion keeps."""
    own = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    gated = convert(own, FixedGate(), adapters=adapters)
    kept = {names[id(p)]: p for p in gated.parameters() if id(p) in names and p.requires_grad}
    holds(bool(kept), "conversion must keep a parameter of the model, and copies them all")
    originals = dict(model.named_parameters())

    def gradients(run: nn.Module, parameters: list[Any]) -> tuple[Tensor | None, ...]:
        loss = forward_fn(run, batch).square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    with torch.enable_grad():
        expected = gradients(model, [originals[name] for name in kept])
        got = gradients(gated, list(kept.values()))
    for name, one, other in zip(kept, got, expected, strict=True):
        equal(f"the gradient of {name}", one, other, tolerance)


def _check_every_head(gated: nn.Module, batch: Any, forward_fn: Callable) -> None:
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            full = forward_fn(gated, batch)
            for name, layer in attention_layers(gated).items():
                gate: Any = layer.gate
                for head in range(layer.num_heads):
                    gate.scale[head] = 0.0
                    change = (forward_fn(gated, batch) - full).abs().max().item()
                    gate.scale[head] = 1.0
                    holds(
                        change > LEAST_CHANGE,
                        f"dropping head {head} of {layer_called(name)} must change the output, and "
                        f"changes it by {change:.1e} (torch.{mode.__name__})",
                    )


def _check_pruning(model: nn.Module, batch: Any, forward_fn: Callable, tolerance: float) -> None:
    layers = attention_layers(model)
    plan = HeadPlan(
        [
            LayerPlan(name, layer.num_heads, list(range(number % 2, layer.num_heads, 2)))
            for number, (name, layer) in enumerate(layers.items())
        ],
        "check",
    )
    masked = mask(copy.deepcopy(model), plan)
    pruned = prune(copy.deepcopy(model), plan)
    with torch.no_grad():
        got, expected = forward_fn(pruned, batch), forward_fn(masked, batch)
    equal("the output of the pruned model, which the masked one gives", got, expected, tolerance)


def _check_copies(
    model: nn.Module,
    batch: Any,
    forward_fn: Callable,
    adapters: Mapping[type, Architecture] | None,
) -> None:
    gated = convert(copy.deepcopy(model), FixedGate(heads=[0]), adapters=adapters)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        save(gated, folder)
        expected = forward_fn(gated, batch)
        equal("the output of a deep copy", forward_fn(copy.deepcopy(gated), batch), expected)
        read = load(folder, model=copy.deepcopy(model), adapters=adapters).eval()
        equal("the output of a model saved and loaded", forward_fn(read, batch), expected)
