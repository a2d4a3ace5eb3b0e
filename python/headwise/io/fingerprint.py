"""Short names of contents: two models or data sets have the same one only if they are equal."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]


def fingerprint(value: Any) -> str:
    """32 hex digits (BLAKE2b, 128 bits) of the contents of ``value``.

    Tensors and arrays count by dtype, shape and bytes, plain values by type and value, containers
    by their items, modules by their classes, the names and contents of their parameters and buffers
    (saved or not) and the configurations of their gates, and other objects by class and attributes
    or, if they have none, by their pickled state.

    Raises:
        ValueError: something whose contents are not accessible.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        _take_in(digest, value)
    except RecursionError:
        raise ValueError(
            f"a {type(value).__name__} that holds itself, or is nested too deeply, cannot be told "
            "from another"
        ) from None
    return digest.hexdigest()


def _take_in(digest: Any, value: Any) -> None:
    """Hashes ``value``: its kind and length, then its contents, so that no two collide."""

    def put(kind: str, about: Any = "") -> None:
        text = f"{kind} {about}".encode("utf-8", "surrogatepass")
        digest.update(f"{len(text)}:".encode() + text)

    if isinstance(value, Tensor):
        put("tensor", f"{value.dtype} {tuple(value.shape)}")
        digest.update(_bytes(value))
    elif isinstance(value, nn.Module):
        _take_in_module(digest, value, put)
    elif isinstance(value, Mapping):
        put("mapping", len(value))
        for key, item in value.items():
            _take_in(digest, key)
            _take_in(digest, item)
    elif isinstance(value, (list, tuple)):
        put("sequence", len(value))
        for item in value:
            _take_in(digest, item)
    elif isinstance(value, (str, bytes, bool, int, float, complex)) or value is None:
        put(type(value).__name__, repr(value))
    elif isinstance(value, (set, frozenset)):
        put("set", len(value))
        for item in sorted(map(fingerprint, value)):
            put("item", item)
    elif hasattr(value, "__array_interface__"):  # NumPy's
        put("array", f"{value.dtype} {value.shape} {value.tolist()!r}")
    else:
        put("object", f"{type(value).__module__}.{type(value).__qualname__}")
        _take_in(digest, _content(value))


def _take_in_module(digest: Any, model: nn.Module, put) -> None:
    put("module")
    for name, module in model.named_modules():
        put(name, type(module).__qualname__)
        if callable(getattr(module, "config", None)):  # a gate
            put("configured", json.dumps(module.config(), sort_keys=True, default=repr))
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            put("named", name)
            _take_in(digest, tensor)


def _bytes(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the meta device has no content to tell it by")
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _content(value: Any) -> Any:
    """An object's contents: its attributes, or its pickled state."""
    held = dict(getattr(value, "__dict__", {}))
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    held |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    if held:
        return held
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises what it likes
        raise ValueError(
            f"a {type(value).__name__} cannot be told from another: {str(error)[:200]}"
        ) from None
