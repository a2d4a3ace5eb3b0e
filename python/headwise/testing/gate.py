"""The requirements on every gate."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwise.gates import Gate, Selection, anneal, gate_from_config, link_gates, penalty
from headwise.nn.gate_proof import check_gates
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.serialization import load, save
from headwise.testing.comparing import equal, holds, raises

_D, _H = 16, 6  # width and heads of the layers for the checks
_LENGTHS = torch.tensor([5, 2, 1, 4])


def check_selection(selection: Selection, batch: int, num_heads: int) -> None:
    """Asserts that a selection is valid.

    Args:
        selection: the result of a gate.
        batch: sequences, B.
        num_heads: heads of the layer, H.

    Raises:
        AssertionError: a wrong shape or dtype; a row of ``index`` that does not begin with
            ``count`` ascending heads or does not end in -1; a weight that is not finite, or not 0
            for a head that was not chosen.
    """
    index, count, weight = selection[:3]
    for name, tensor, shape in (
        ("index", index, (batch, num_heads)),
        ("count", count, (batch,)),
        ("weight", weight, (batch, num_heads)),
    ):
        holds(tensor.shape == shape, f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if name != "weight":
            holds(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
    for name in ("weight", "relevance", "budget"):
        part = getattr(selection, name)
        holds(part is None or bool(torch.isfinite(part).all()), f"{name} must be finite")
    for b in range(batch):
        k = int(count[b])
        holds(0 <= k <= num_heads, f"count must be in 0..{num_heads}, got {k}")
        heads = index[b, :k].tolist()
        fits = heads == sorted(set(heads)) and all(0 <= head < num_heads for head in heads)
        holds(fits, f"index of sequence {b} must begin with {k} ascending heads, got {heads}")
        holds((index[b, k:] == -1).all(), f"index of sequence {b} must be -1 behind its {k} heads")
        others = [head for head in range(num_heads) if head not in heads]
        holds(
            (weight[b, others] == 0).all(),
            f"weight of sequence {b} must be 0 for heads that it did not choose",
        )


def check_gate(gate: Gate | Callable[[], Gate], *, compiles: bool = True) -> None:
    """Checks a gate in the same way as the library's tests check its own.

    The gate is bound to layers of 6 heads and width 16, given random parameters, and tried on
    random inputs:

    - its selections are valid (:func:`check_selection`) in training and evaluation, at any
      progress, in four floating dtypes, with padding, and for batches without sequences;
    - ``config()`` goes through JSON and builds the same gate; a second gate with the first one's
      ``state_dict()`` chooses the same, as do a deep copy and a saved and loaded layer;
    - the penalty is a finite scalar and :func:`headwise.anneal` refuses progress outside [0, 1];
    - evaluation changes no state, and activation checkpointing no gradient and no state;
    - the layer's output equals that of all heads, multiplied by the gate's weights;
    - the layer compiles once for all batch sizes.

    Args:
        gate: a gate that is not bound, or a function that makes one.
        compiles: compile the layer; it takes a few seconds. False for a gate that needs the host.

    Raises:
        AssertionError: one of these checks fails; the sentence names it.
        TypeError: ``gate`` is not a gate.
        ValueError: it is bound, or its layer's output is wrong.
    """
    prototype = gate if isinstance(gate, Gate) else gate()
    if not isinstance(prototype, Gate):
        raise TypeError(f"gate must be a headwise.Gate, got {type(prototype).__name__}")
    if prototype.num_heads is not None:
        raise ValueError("gate must not be bound to a layer")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        _check_config(prototype)
        _check_selections(prototype)
        layer = _trained(prototype)
        _check_evaluation(layer)
        _check_copies(prototype, layer)
        _check_penalty(prototype)
        _check_checkpointing(prototype)
        check_gates(layer)
        if compiles:
            _check_compiles(layer)


def _layer(prototype: Gate) -> MultiheadAttention:
    layer = MultiheadAttention(_D, _H, head_dim=4, gate=prototype, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return link_gates(layer)  # type: ignore[return-value]


def _trained(prototype: Gate) -> MultiheadAttention:
    layer = _layer(prototype).train()
    anneal(layer, 0.7)
    for _ in range(3):
        _run(layer, 3 * torch.randn(4, 5, _D) + 1).square().sum().backward()
    return layer.eval()


def _run(layer: MultiheadAttention, x: Tensor, padding: Tensor | None = None) -> Tensor:
    return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def _padding(lengths: Tensor = _LENGTHS, length: int = 5) -> Tensor:
    return torch.arange(length) >= lengths[:, None]


def _choices(layer: MultiheadAttention, x: Tensor, padding: Tensor | None = None) -> Selection:
    """What the gate selects in a call of its layer; random gates draw the same every time."""
    seen: list[Selection] = []

    def observe(layer: Any, selection: Selection, x: Tensor, padding: Tensor | None) -> None:
        seen.append(selection)

    layer._observers.append(observe)
    try:
        torch.manual_seed(5)
        _run(layer, x, padding)
    except Exception as error:
        if not seen:
            raise AssertionError(
                f"a gate must run in a layer with embed_dim={layer.embed_dim} and num_heads="
                f"{layer.num_heads} (of a pruned layer, num_heads need not divide embed_dim), and "
                f"raises {type(error).__name__}: {error}"
            ) from error
        # The layer refuses the selection: check_selection raises the reason.
    finally:
        layer._observers.remove(observe)
    return seen[0]


def _same(what: str, got: Selection, expected: Selection) -> None:
    for name, one, other in zip(Selection._fields, got, expected, strict=True):
        equal(f"{name} of {what}", one, other)


def _check_config(prototype: Gate) -> None:
    config = json.loads(json.dumps(prototype.config()))
    built = gate_from_config(config)
    holds(type(built) is type(prototype), f"config() must build a {type(prototype).__name__}")
    holds(
        built.config() == prototype.config(),
        f"config() must come back from JSON as it was, got {built.config()}",
    )
    raises("an unknown option", ValueError, lambda: gate_from_config({**config, "colour": 1}))


def _check_selections(prototype: Gate) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer = _layer(prototype).to(dtype)
        x = torch.randn(4, 5, _D, dtype=dtype)
        for progress in (0.0, 0.6, 1.0) if dtype == torch.float32 else (0.6,):
            anneal(layer, progress)
            for training in (True, False):
                layer.train(training)
                for padding in (None, _padding()):
                    selection = _choices(layer, x, padding)
                    check_selection(selection, 4, _H)
                    holds(
                        selection.weight.dtype == dtype,
                        f"weight must have the dtype of x, {dtype}, got {selection.weight.dtype}",
                    )
                if not training:
                    holds(
                        torch.equal((selection.weight != 0).sum(1).int(), selection.count),
                        "in evaluation every head that was chosen must have a weight other than 0",
                    )
        check_selection(_choices(layer.eval(), x[:0]), 0, _H)


def _check_evaluation(layer: MultiheadAttention) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        first = _choices(layer, torch.randn(4, 5, _D), _padding())
    check_selection(first, 4, _H)
    for name, value in layer.state_dict().items():
        equal(f"{name}, which evaluation must not change", value, before[name])


def _check_copies(prototype: Gate, layer: MultiheadAttention) -> None:
    gate: Any = layer.gate
    unsaved = {name for name, _ in gate.named_buffers()} - set(gate.state_dict())
    holds(not unsaved, f"buffers must be saved in the state, {sorted(unsaved)} are not")
    loaded = _layer(prototype).eval()
    loaded.load_state_dict(layer.state_dict())
    copied = link_gates(copy.deepcopy(layer))
    with tempfile.TemporaryDirectory() as folder:
        save(layer, folder)
        plain = MultiheadAttention(_D, _H, head_dim=4, batch_first=True).eval()
        read = load(folder, model=plain)
    x = torch.randn(4, 5, _D)
    expected = _choices(layer, x, _padding())
    for what, other in (
        ("a gate with the same state_dict()", loaded),
        ("a deep copy", copied),
        ("a layer that was saved and loaded", read),
    ):
        _same(what, _choices(other, x, _padding()), expected)  # type: ignore[arg-type]


def _check_penalty(prototype: Gate) -> None:
    layer = _layer(prototype).train()
    equal("the penalty before any forward", penalty(layer).detach(), torch.zeros(()))
    anneal(layer, 0.5)
    output = _run(layer, torch.randn(4, 5, _D))
    found = penalty(layer)
    holds(found.dim() == 0, f"the penalty must be a scalar, got shape {tuple(found.shape)}")
    holds(torch.isfinite(found), f"the penalty must be finite, got {found.item()}")
    (output.square().mean() + found).backward()
    for name, parameter in layer.named_parameters():
        finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
        holds(finite, f"the gradient of {name} must be finite")
    for progress in (-0.1, 1.1):
        raises(f"anneal({progress})", ValueError, lambda p=progress: layer.gate.anneal(p))  # type: ignore[misc,union-attr]


def _check_checkpointing(prototype: Gate) -> None:
    layer = _layer(prototype).train()
    anneal(layer, 0.5)
    found = []
    for checkpointed in (False, True):
        own = link_gates(copy.deepcopy(layer))
        torch.manual_seed(3)
        for _ in range(2):
            x = torch.randn(4, 5, _D, requires_grad=True)
            y = checkpoint(_run, own, x, use_reentrant=False) if checkpointed else _run(own, x)  # type: ignore[arg-type]
            (y.square().mean() + penalty(own)).backward()
        result = {"the input's gradient": x.grad}
        result |= {f"the gradient of {n}": p.grad for n, p in own.named_parameters()}
        found.append({**result, **own.state_dict()})
    for name, value in found[1].items():
        equal(f"{name}, with activation checkpointing", value, found[0][name], 1e-5)


def _check_compiles(layer: MultiheadAttention) -> None:
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(_run, dynamic=True, backend=backend, fullgraph=True)
    with torch.no_grad():
        for batch in (7, 3, 5, 2):
            x = torch.randn(batch, 4, _D)
            torch.manual_seed(1)
            got = compiled(layer, x)
            torch.manual_seed(1)
            equal("the compiled layer's output", got, _run(layer, x), 1e-5)
    holds(graphs == 1, f"the layer must compile once for all batch sizes, got {graphs} graphs")
