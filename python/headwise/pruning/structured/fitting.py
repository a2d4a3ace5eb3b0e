"""The sizes of a model that was compacted, as its file describes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from headwise.nn.layers import replace_module
from headwise.pruning.structured.compaction import (
    leave_fast_paths,
    narrow,
    resized_linear,
    skip_norms,
)
from headwise.pruning.structured.description import FeedForward, structure
from headwise.pruning.structured.narrow import NarrowTransformerEncoder, SkippedLayerNorm, Widening

_KEYS = {"ffn", "hidden", "skipped_norms"}


def describe_structure(model: nn.Module) -> dict[str, Any] | None:
    """The sizes of ``model`` beyond those of its attention layers; None: none."""
    found = structure(model)
    if not found.ffn:
        return None
    ffn = [
        {"name": name, "neurons": f.num_neurons, "bias": f.second.bias is not None}
        for name, f in found.ffn.items()
    ]
    size = _original_size(model)
    kept = found.attention[found.layers[0].attention].embed_dim if found.layers else None
    hidden = None if size is None or kept in (None, size) else {"size": size, "kept": kept}
    skipped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (SkippedLayerNorm, Widening))
    ]
    return {"ffn": ffn, "hidden": hidden, "skipped_norms": skipped}


def _original_size(model: nn.Module) -> int | None:
    """The width of the residual stream before its dimensions were pruned, if known."""
    for module in model.modules():
        if isinstance(module, NarrowTransformerEncoder):
            return module.size
    return getattr(getattr(model, "config", None), "hidden_size", None)


def check_document(document: Any, where: str) -> None:
    """Raises ValueError: ``document`` is not what :func:`describe_structure` returns."""

    def integer(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    what = f"'structure' of {where}"
    if not isinstance(document, dict) or set(document) != _KEYS:
        raise ValueError(f"{what} must be an object with the keys {', '.join(sorted(_KEYS))}")
    entries = document["ffn"]
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and set(entry) == {"name", "neurons", "bias"}
        and isinstance(entry["name"], str)
        and integer(entry["neurons"])
        and isinstance(entry["bias"], bool)
        for entry in entries
    ):
        raise ValueError(f"'ffn' of {what} must be a list of objects with name, neurons and bias")
    skipped = document["skipped_norms"]
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ValueError(f"'skipped_norms' of {what} must be a list of names")
    hidden = document["hidden"]
    if hidden is not None and not (
        isinstance(hidden, dict)
        and set(hidden) == {"size", "kept"}
        and integer(hidden["size"])
        and integer(hidden["kept"])
        and 0 < hidden["kept"] <= hidden["size"]
    ):
        raise ValueError(f"'hidden' of {what} must be null or an object with size and kept")


def fit_structure(model: nn.Module, document: dict[str, Any]) -> nn.Module:
    """Gives a converted model the sizes of ``document``, in place; the caller sets the values.

    Raises:
        ValueError: ``model`` does not have what the document names.
    """
    found = structure(model)
    for entry in document["ffn"]:
        if entry["name"] not in found.ffn:
            raise ValueError(
                f"model ({type(model).__name__}) has no feed-forward network '{entry['name']}'; "
                f"it has {', '.join(map(repr, found.ffn)) or 'none'}"
            )
        _fit_ffn(model, found.ffn[entry["name"]], entry)
    norms = {name for layer in found.layers for name in layer.norms}
    for name in document["skipped_norms"]:
        if name not in norms:
            raise ValueError(
                f"model ({type(model).__name__}) has no layer norm '{name}'; "
                f"it has {', '.join(map(repr, sorted(norms))) or 'none'}"
            )
    skip_norms(
        model,
        [n for n in document["skipped_norms"] if isinstance(model.get_submodule(n), nn.LayerNorm)],
    )
    hidden = document["hidden"]
    if hidden is not None and _width(model) != hidden["kept"]:
        found = structure(model)
        if found.stream is None or found.hidden_size != hidden["size"]:
            raise ValueError(
                f"model ({type(model).__name__}) must have a residual stream of "
                f"{hidden['size']} dimensions, got "
                + (found.no_stream if found.stream is None else str(found.hidden_size))
            )
        model = narrow(model, found.stream, hidden["kept"])
    return leave_fast_paths(model)


def _width(model: nn.Module) -> int | None:
    found = structure(model)
    return found.attention[found.layers[0].attention].embed_dim if found.layers else None


def _fit_ffn(model: nn.Module, ffn: FeedForward, entry: dict[str, Any]) -> None:
    first, second = ffn.first, ffn.second
    if (ffn.num_neurons, second.bias is not None) == (entry["neurons"], entry["bias"]):
        return
    new = resized_linear(first, first.in_features, entry["neurons"], first.bias is not None)
    replace_module(model, first, new)
    new = resized_linear(second, entry["neurons"], second.out_features, entry["bias"])
    replace_module(model, second, new)
