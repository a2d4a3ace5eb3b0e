"""Models as programs that do not need headwise: for ONNX and other runtimes.

Such runtimes have no operators that run only some heads. A gate's choice is still computed, and
every head multiplied by its weight: the numbers are those of the model, the cost is that of all
heads.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn.instrumenting import replaced
from headwise.nn.layers import attention_layers
from headwise.nn.visible_keys import attend_visible, is_masked

__all__ = ["export_onnx", "plain_program"]

_ops = torch.ops.headwise
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def plain_program(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """``model`` by ``torch.export``, in operators of PyTorch alone.

    A layer without a gate, pruned or not, costs what it costs in the model. **A layer with a gate
    skips nothing**: every head is computed and multiplied by its weight, 0 if it was not chosen,
    and a warning is given. To save time in another runtime, prune (:func:`headwise.prune`).

    Args:
        model: a converted model in evaluation mode; it is not changed.
        args: example inputs, by position.
        kwargs: example inputs, by name.
        dynamic_shapes: as in ``torch.export.export``.

    Returns:
        The program; ``program.module()`` runs it in PyTorch.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``model`` has no attention layer of headwise or is in training mode, or a gate
            consists of operators that PyTorch does not have.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention or "
            f"GroupedQueryAttention: call headwise.convert(model) first"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if skips_nothing(model):
        warnings.warn(note(model), stacklevel=2)
    # As for a recorder: the layers compute every head, in plain operators.
    with replaced(layers.values(), "_probe", lambda layer, probe: None):
        program = torch.export.export(
            model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
        )
    program = program.run_decompositions(_decompositions())
    left = sorted({str(target) for target in _targets(program) if target.namespace == "headwise"})
    if left:
        raise ValueError(
            f"model must consist of operators that PyTorch has once every head runs, and its gates "
            f"use {', '.join(left)}"
        )
    return program


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Writes ``model`` as ONNX, by :func:`plain_program` (with a gate: **every head runs**).

    The file's metadata has a key ``headwise`` that says which heads run. Padded rows and sequences
    without a visible key give finite numbers, as in the model.

    Args:
        model: a converted model in evaluation mode; it is not changed.
        path: the file to write.
        args: example inputs, by position.
        kwargs: example inputs, by name; the inputs of the file have these names.
        dynamic_shapes: as in ``torch.export.export``.
        options: passed to ``torch.onnx.export``, such as ``opset_version``.

    Raises:
        ImportError: ``onnx`` or ``onnxscript`` is not installed.
        ValueError: as :func:`plain_program`.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"export_onnx needs {package}: pip install onnx onnxscript")
    program = plain_program(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    written: Any = torch.onnx.export(program, dynamo=True, **{"verbose": False, **options})
    written.model.metadata_props["headwise"] = note(model)
    written.save(Path(path))
    return written


def skips_nothing(model: nn.Module) -> bool:
    """Whether heads that the model would skip run in its :func:`plain_program`."""
    return any(layer.gate is not None for layer in attention_layers(model).values())


def note(model: nn.Module) -> str:
    """Which heads run in the :func:`plain_program` of ``model``, in a sentence."""
    layers = attention_layers(model).values()
    heads = sum(layer.num_heads for layer in layers)
    if not skips_nothing(model):
        return f"headwise: {heads} attention heads in {len(layers)} layers, all of them run"
    kinds = sorted({type(layer.gate).__name__ for layer in layers if layer.gate is not None})
    return (
        f"headwise: masked, not skipped: all {heads} attention heads in {len(layers)} layers run "
        f"for every input, and {', '.join(kinds)} only multiplies their outputs; the choice saves "
        f"no time in this program"
    )


def _targets(program: torch.export.ExportedProgram) -> list[torch._ops.OpOverload]:
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    nodes = (node for graph in graphs for node in graph.nodes)
    return [n.target for n in nodes if isinstance(n.target, torch._ops.OpOverload)]


def _decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """How each operator of headwise is made of PyTorch's."""
    table: dict[torch._ops.OperatorBase, Callable[..., Any]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("headwise::"):
            operator = getattr(_ops, schema.name.partition("::")[2]).default
            if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), _COMPOSITE):
                table[operator] = functools.partial(_parts, operator)
    table[_ops.dense_attention.default] = _dense_attention
    for name in ("evaluate_budget_gate", "evaluate_relevance"):
        operator = getattr(_ops, name).default
        table[operator] = _not_fused(operator)
    table[_ops.select_heads.default] = _select_heads
    table[_ops.selection_mask.default] = _selection_mask
    return table


def _parts(operator: torch._ops.OpOverload, *args: Any, **named: Any) -> Any:
    return operator._op_dk(_COMPOSITE, *args, **named)  # `decompose` would ask the table again


def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    added_keys: int = 0,
) -> Tensor:
    masks = (key_padding_mask, attn_mask, is_causal)
    if is_masked(key_padding_mask, attn_mask):
        return attend_visible(q, k, v, *masks, scale, added_keys)
    operator = _ops.dense_attention.default
    return _parts(operator, q, k, v, *masks, dropout_p, scale, added_keys)


def _not_fused(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The operator in the parts that it has where a gradient is wanted, not as one kernel."""
    base = next(i for i, own in enumerate(operator._schema.arguments) if own.name == "base")

    def composed(*args: Any) -> Any:
        with torch.enable_grad():
            wanted = args[base].detach().requires_grad_()
            return _parts(operator, *args[:base], wanted, *args[base + 1 :])

    return composed


# Comparisons and sums of integers, which every runtime has.


def _select_heads(relevance: Tensor, count: Tensor) -> Tensor:
    """As ``headwise::select_heads``, without its checks of values: [B, H], [B] -> int32 [B, H]."""
    head = torch.arange(relevance.size(1), device=relevance.device)  # [H]
    own, other = relevance[:, :, None], relevance[:, None, :]
    better = (other > own) | ((other == own) & (head < head[:, None]))  # [B, H, H]
    chosen = better.to(torch.int64).sum(2) < count[:, None]  # [B, H]
    slot = chosen.to(torch.int64).cumsum(1) - 1  # [B, H]
    filled = (chosen[:, None, :] & (slot[:, None, :] == head[:, None])).to(torch.int64)
    # [B, slot]: 0 for an empty slot, else one more than the head
    return ((filled * (head + 1)).sum(2) - 1).to(torch.int32)


def _selection_mask(index: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``headwise::selection_mask``: [B, H], [B] -> [B, H] of ones and zeros."""
    head = torch.arange(index.size(1), device=index.device)  # [H]
    listed = head < count[:, None]  # [B, H]: slots in use
    found = (index[:, :, None] == head) & listed[:, :, None]  # [B, slot, H]
    return (found.to(torch.int64).sum(1) > 0).to(dtype)
