"""``headwise.save`` and ``headwise.load``: a model as a self-describing folder.

The folder holds ``headwise.json`` (the attention layers with their sizes and gates, the moves of
sleeping heads in training, and for a model of transformers its class and configuration) and
``model.safetensors`` (every tensor). C++ reads the same folder (``headwise/model.h``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.convert import Architecture, convert
from headwise.gates import gate_from_config, head_moves, link_gates
from headwise.gates.sleep import restore_moves
from headwise.io.checked import checked_path
from headwise.io.files import existing_folder, write_atomic
from headwise.io.printable import layer_called, path_called, printable, quoted
from headwise.io.safetensors_files import load_safetensors, save_safetensors
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers, carry_hooks, replace_module
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.pruning.structured.fitting import check_document, describe_structure, fit_structure
from headwise.pruning.structured.masks import masks_of
from headwise.serialization.card import CARD, model_card
from headwise.serialization.meta_device import materialise

__all__ = ["load", "save"]

FORMAT = "headwise.model"
VERSION = 1
DESCRIPTION = "headwise.json"
WEIGHTS = "model.safetensors"
LONGEST_DESCRIPTION = 64 << 20  # bytes, as in C++

_DOCUMENT_KEYS = {"format", "version", "headwise_version", "architecture", "layers", "aliases"}
_OPTIONAL_KEYS = {"structure", "moves"}  # of removed neurons or dimensions, or moved heads
# The kinds of layer, by the "class" of their entries; an entry without one is of the first kind.
_KINDS: dict[str, type[AttentionLayer]] = {
    kind.__name__: kind for kind in (MultiheadAttention, GroupedQueryAttention)
}
# The keys of every entry besides those of its kind.
_ENTRY_TYPES = {"name": str, "gate": (dict, type(None))}


def _kind(layer: AttentionLayer) -> str:
    return next(kind for kind in type(layer).__mro__ if kind.__name__ in _KINDS).__name__


def _describe_layer(name: str, layer: AttentionLayer) -> dict[str, Any]:
    kind = _kind(layer)
    return {
        "name": name,
        **({} if kind == MultiheadAttention.__name__ else {"class": kind}),
        **({} if layer.variant is None else {"variant": layer.variant}),
        **layer.describe(),
        "gate": None if layer.gate is None else layer.gate.config(),
    }


def _describe_architecture(model: nn.Module) -> dict[str, Any]:
    kind = type(model)
    transformers: Any = None
    with contextlib.suppress(ImportError):
        import transformers
    if (
        transformers is not None
        and isinstance(model, transformers.PreTrainedModel)
        and getattr(transformers, kind.__name__, None) is kind
    ):
        return {
            "library": "transformers",
            "library_version": transformers.__version__,
            "class": kind.__name__,
            "config": json.loads(model.config.to_json_string(use_diff=True)),
        }
    return {"library": "torch", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of ``model`` with each tied tensor once, and the aliases of the others."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model must have only tensors in its state, got {type(value).__name__} at '{name}'"
            )
        held: Any = value.detach()
        sharded = _is_sharded(held)
        own = held.to_local() if sharded else held
        key = (held.device, own.data_ptr(), held.dtype, held.shape, held.stride())
        if held.numel() > 0 and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = (held.full_tensor() if sharded else held).cpu().contiguous()
    return tensors, aliases


def _is_sharded(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # DTensors exist only if it is loaded
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@contextlib.contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``target`` if the block succeeds, and is removed otherwise.

    Other files in ``target`` are kept.
    """
    if target.exists() and not (target.is_dir() and _may_replace(target)):
        raise ValueError(
            f"dir must not exist, be empty, or be a folder that headwise.save wrote, "
            f"got {quoted(str(target), 300)}"
        )
    place = Path(os.path.realpath(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = _C.folder_beside(place)
    try:
        yield beside
        _C.replace_folder(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _may_replace(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file() or not any(folder.iterdir())


def save(
    model: nn.Module,
    dir: str | os.PathLike,
    *,
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``model`` to the folder ``dir``: ``headwise.json`` and ``model.safetensors``.

    Everything is written next to ``dir`` and moved into place in one step, so a reader of ``dir``
    finds the old model or the new one, also after a crash and with several writers (the last one
    wins). Other files in a folder that :func:`save` wrote before are kept, and a symbolic link
    stays one. (On a file system that cannot exchange two folders, there is none for a moment.)

    The parameters of a sharded model (FSDP2's ``DTensor``) are gathered: every process calls
    :func:`save`, the first one writes.

    Args:
        model: a module with :class:`headwise.MultiheadAttention` layers, pruned or not (not
            under a :class:`headwise.pruning.StructurePlan` as a mask). A model of transformers is
            described by its class and configuration, and :func:`load` needs nothing else; for any
            other module, :func:`load` needs ``model=``.
        dir: the folder.
        tokenizer: a tokenizer of transformers to save in the folder too.
        card: options of :func:`headwise.serialization.model_card` (``{}``, ``{"plan": plan,
            "metrics": {"accuracy": 0.82}}``): a ``README.md`` with the heads of each layer, the
            method and the plan. None: no card is written, and one that is there is kept.

    Raises:
        TypeError: ``dir`` is not a path.
        ValueError: ``model`` has no converted layer, ``dir`` is something else, or a metric of the
            card is not a number.
        OSError: it cannot be written; nothing is left behind.
    """
    target = checked_path("dir", dir)
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention to save: "
            f"call headwise.convert first"
        )
    if masks_of(model) is not None:
        raise ValueError(
            "model has a structure plan as a mask, which cannot be saved: save the result of "
            "headwise.prune, or the model before it was masked"
        )
    tensors, aliases = _unique_tensors(model)
    text = _described(model, aliases)
    readme = None if card is None else model_card(model, **card)
    sharded = any(map(_is_sharded, model.parameters()))
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            with _written_whole(Path(os.path.abspath(target))) as folder:
                save_safetensors(folder / WEIGHTS, tensors)
                write_atomic(folder / DESCRIPTION, text)
                if readme is not None:
                    write_atomic(folder / CARD, readme)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
    finally:
        if sharded:  # when the others return, their folder exists too
            torch.distributed.barrier()


def description(model: nn.Module) -> str:
    """The text of ``headwise.json`` for weights of ``model`` that something else wrote."""
    return _described(model, _unique_tensors(model)[1])


def _described(model: nn.Module, aliases: dict[str, str]) -> str:
    structure, moves = describe_structure(model), head_moves(model)
    layers = attention_layers(model)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "headwise_version": _C.__version__,
        "architecture": _describe_architecture(model),
        "layers": [_describe_layer(name, layer) for name, layer in layers.items()],
        **({} if structure is None else {"structure": structure}),
        **({"moves": moves} if moves else {}),
        "aliases": aliases,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def load(
    dir: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    adapters: Mapping[type, Architecture] | None = None,
) -> nn.Module:
    """The model in the folder ``dir`` that :func:`save` wrote, or a Trainer's checkpoint
    (:class:`headwise.serialization.trainer.GateCallback`).

    Args:
        dir: the folder.
        model: a module of the architecture that was saved, converted or not; it is changed in place
            and returned. Needed unless the saved model was one of transformers. Layers are made
            smaller to fit pruned ones. Tensors on the meta device move to the CPU.
        adapters: those of :func:`headwise.convert`, if the saved model was converted with them and
            ``model`` is not.

    Returns:
        The model; if it was built here, it is in evaluation mode.

    Raises:
        TypeError: ``dir`` is not a path, or ``adapters`` are something else.
        FileNotFoundError: ``dir`` or one of its two files does not exist.
        ValueError: a file is not what :func:`save` writes (by key), or ``model`` does not fit
            (by layer or tensor). ``model`` is then unusable.
    """
    folder = existing_folder("dir", dir)
    document = _read_description(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"dir has no weights: {path_called(folder / WEIGHTS)} does not exist"
        )
    tensors = load_safetensors(folder / WEIGHTS)
    for alias, name in document["aliases"].items():
        if not isinstance(name, str) or name not in tensors:
            raise ValueError(
                f"aliases of {path_called(folder / DESCRIPTION)} name {quoted(name)}, which is "
                "missing"
            )
        tensors[alias] = tensors[name]

    built_here = model is None
    if model is None:
        model = _build(document["architecture"], folder, tensors)
        empty = False
    else:
        given = model
        empty = materialise(given, lambda: _fresh(document["architecture"], folder, given, tensors))
    model = convert(model, strict=False, verify=not empty, adapters=adapters)
    layers = attention_layers(model)
    for entry in document["layers"]:
        if entry["name"] not in layers:
            raise ValueError(
                f"model ({type(model).__name__}) has no attention layer "
                f"{quoted(entry['name'])}; it has {printable(', '.join(map(repr, layers)), 200)}"
            )
    if "structure" in document:
        model = fit_structure(model, document["structure"])
    layers = attention_layers(model)
    for entry in document["layers"]:
        _check_room(model, entry, tensors, folder)
        model = _fit_layer(model, layers[entry["name"]], entry)
    _load_tensors(model, tensors, folder / WEIGHTS)
    link_gates(model)
    restore_moves(
        model, document.get("moves", []), f"'moves' of {path_called(folder / DESCRIPTION)}"
    )
    return model.eval() if built_here else model


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"dir is not a headwise model: {path_called(path)} does not exist")
    document = json.loads(_C.read_json(path, LONGEST_DESCRIPTION))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path_called(path)} must have format '{FORMAT}'")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path_called(path)} must have version {VERSION}, got {quoted(version)}")
    _check_keys(document, _DOCUMENT_KEYS | (_OPTIONAL_KEYS & set(document)), f"{path_called(path)}")
    if "structure" in document:
        check_document(document["structure"], f"{path_called(path)}")
    for key, kind in (("architecture", dict), ("layers", list), ("aliases", dict)):
        if not isinstance(document[key], kind):
            raise ValueError(
                f"'{key}' of {path_called(path)} must be a {kind.__name__}, got "
                f"{quoted(document[key])}"
            )
    names = set()
    for i, layer in enumerate(document["layers"]):
        where = f"layer {i} of {path_called(path)}"
        if not isinstance(layer, dict):
            raise ValueError(f"{where} must be an object, got {quoted(layer)}")
        kind = layer.get("class", MultiheadAttention.__name__)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(
                f"'class' of {where} must be one of {', '.join(_KINDS)}, got {quoted(kind)}"
            )
        types: dict[str, Any] = {**_ENTRY_TYPES, **_KINDS[kind].DESCRIBED}
        types.update({key: str for key in ("class", "variant") if key in layer})
        _check_keys(layer, set(types), where)
        for key, accepted in types.items():
            fits = isinstance(layer[key], accepted)
            if isinstance(layer[key], bool):  # an int to Python
                fits = accepted is bool
            if not fits:
                raise ValueError(f"'{key}' of {where} has the wrong type: {quoted(layer[key])}")
        if layer["name"] in names:
            raise ValueError(
                f"layers of {path_called(path)} must have unique names, got "
                f"{quoted(layer['name'])} twice"
            )
        names.add(layer["name"])
    return document


def _check_keys(document: Mapping[str, Any], expected: set[str], where: str) -> None:
    unknown, missing = sorted(set(document) - expected), sorted(expected - set(document))
    if unknown:
        raise ValueError(f"{where} has an unknown key {quoted(unknown[0])}")
    if missing:
        raise ValueError(f"{where} lacks the key '{missing[0]}'")


class _TooLarge(ValueError):
    """A configuration is too large for the weights next to it."""


#: How much larger than its weights a model may be before it is pruned to their size.
_MOST_PRUNED = 1000


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks the integers of a configuration, before transformers uses them as sizes."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value, tensors, where)
        elif isinstance(value, str) and key.endswith("attn_implementation") and "/" in value:
            raise _TooLarge(f"'{key}' of {where} must not name code to fetch, got {quoted(value)}")
        elif isinstance(value, int) and not isinstance(value, bool):
            most = 2**40
            if key.endswith(("layers", "n_layer", "num_labels", "groups")):
                most = max(elements, 64)  # each takes time to build, or a row of a table
            if key.endswith(("layers", "n_layer")):
                most = max(len(tensors), 64)
            if abs(value) > most:
                raise _TooLarge(
                    f"'{key}' of {where} is {quoted(value)}, more than the weights explain"
                )


def _check_total(size: int, tensors: Mapping[str, Tensor], where: str) -> None:
    elements = sum(tensor.numel() for tensor in tensors.values())
    if size > _MOST_PRUNED * max(elements, 1):
        raise _TooLarge(
            f"{where} is of a model with {size} parameters, more than {_MOST_PRUNED} times the "
            f"{elements} in {WEIGHTS}"
        )


def _check_room(
    model: nn.Module, entry: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Checks that a layer is not larger than its tensors, because its sizes are allocated."""
    own = [tensor for name, tensor in tensors.items() if name.startswith(entry["name"])]
    if not own:
        raise ValueError(
            f"{path_called(folder / WEIGHTS)} does not fit model ({type(model).__name__}): it "
            f"has no tensor of {layer_called(entry['name'])}"
        )
    elements = sum(tensor.numel() for tensor in own)
    width = entry["num_heads"] * entry["head_dim"]
    rows = {"embed_dim": width, "kdim": width, "vdim": width}  # of a matrix that has the columns
    for key in ("num_heads", "head_dim", "num_key_value_heads", *rows):
        size = entry.get(key, 0)
        most = elements // max(rows.get(key, 1), 1) if width else 2**31 - 1
        if size > most:
            raise ValueError(
                f"'{key}' of {layer_called(entry['name'])} of "
                f"{path_called(folder / DESCRIPTION)} is {quoted(size)}, which its tensors do "
                "not have"
            )


def _build(architecture: dict[str, Any], folder: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A fresh model of transformers, from its class and configuration."""
    name = architecture.get("class")
    if architecture.get("library") != "transformers":
        raise ValueError(
            f"{path_called(folder)} holds the weights of a {name}, which only its own code can "
            "build: pass model="
        )
    try:
        import transformers

        from headwise.convert.older_versions import configuration
    except ImportError:
        raise ValueError(
            f"{path_called(folder)} holds a {name} of transformers, which is not installed"
        ) from None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"architecture of {path_called(folder / DESCRIPTION)} must be a model class of "
            f"transformers {transformers.__version__}, got {quoted(name)}"
        )
    if not isinstance(architecture.get("config"), dict):
        raise ValueError(
            f"architecture of {path_called(folder / DESCRIPTION)} lacks the key 'config'"
        )
    where = f"config of {path_called(folder / DESCRIPTION)}"
    _check_sizes(architecture["config"], tensors, where)
    config_class: Any = kind.config_class
    try:
        config = configuration(config_class, architecture["config"])
        with torch.device("meta"):  # without memory, to compare its size
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        _check_total(size, tensors, where)
        return kind(configuration(config_class, architecture["config"]))
    except _TooLarge:
        raise
    except Exception as error:
        # Any error that its code raises for a foreign configuration.
        reason = printable(str(error), 200)
        raise ValueError(f"{where} builds no {name}: {type(error).__name__}: {reason}") from error


def _fresh(
    architecture: dict[str, Any], folder: Path, model: nn.Module, tensors: dict[str, Tensor]
) -> nn.Module | None:
    """A model of the class of the saved ``model``, on a device."""
    if architecture.get("class") != type(model).__name__:
        return None
    made = _build(architecture, folder, tensors)
    return convert(made, strict=False, verify=False) if attention_layers(model) else made


def _fit_layer(model: nn.Module, layer: AttentionLayer, entry: dict[str, Any]) -> nn.Module:
    """Gives ``layer`` the sizes and the gate of ``entry``."""
    kind = entry.get("class", MultiheadAttention.__name__)
    if not isinstance(layer, _KINDS[kind]):
        raise ValueError(
            f"{layer_called(entry['name'])} is a {_kind(layer)} in model and a {kind} in the file"
        )
    fitted = layer.fitted({key: entry[key] for key in _KINDS[kind].DESCRIBED}, entry["name"])
    if fitted is not layer:
        carry_hooks(layer, fitted)
        model = replace_module(model, layer, fitted)
        layer = fitted
    try:
        layer.set_gate(None if entry["gate"] is None else gate_from_config(entry["gate"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"gate of {layer_called(entry['name'])}: {error}") from None
    if layer.gate is not None:
        layer.gate.train(layer.training)
    return model


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    unknown = [name for name in tensors if name not in state]
    if missing or unknown:
        what = (
            f"lacks {quoted(missing[0])}"
            if missing
            else f"has {quoted(unknown[0])}, which model does not have"
        )
        raise ValueError(
            f"{path_called(path)} does not fit model ({type(model).__name__}): it {what} "
            f"({len(missing)} tensors missing, {len(unknown)} unknown)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"'{name}' has shape {list(tensor.shape)} in {path_called(path)} and "
                f"{list(state[name].shape)} in model"
            )
    # The file's dtype is kept, so that a model saved in half precision stays so.
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors and value.dtype != tensors[name].dtype:
            value.data = value.data.to(tensors[name].dtype)
    with torch.no_grad():
        model.load_state_dict(tensors)
