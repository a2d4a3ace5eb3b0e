"""A pruned model as a folder that transformers reads without headwise."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
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
from headwise.convert.saving import SavePretrained, original_state, unlike_the_original
from headwise.io.checked import checked_path
from headwise.io.files import write_json
from headwise.io.printable import printable
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.instrumenting import evaluating
from headwise.nn.layers import attention_layers
from headwise.serialization.card import write_card

__all__ = ["save_for_transformers"]

#: The module beside the weights, and its code. It resizes what the original class builds.
MODULE = "modeling_pruned"
CODE = '''"""{kind} with the attention heads that pruning left, layer by layer.

Written by headwise, which is not needed to load it.
"""

import torch
import transformers
from torch import nn


class {kind}(transformers.{kind}):
    """Builds the original layers, then gives them the sizes in ``config.pruned``."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, shapes in config.pruned["parameters"].items():
            module = self.get_submodule(name)
            for own, shape in shapes.items():
                whole = getattr(module, own)
                part = whole.detach()
                for axis, size in enumerate(shape):
                    rows = torch.arange(size, device=part.device) % part.size(axis)
                    part = part.index_select(axis, rows)
                setattr(module, own, nn.Parameter(part, whole.requires_grad))
        for name, attributes in config.pruned["attributes"].items():
            for own, value in attributes.items():
                setattr(self.get_submodule(name), own, value)
'''

#: How attention modules of transformers call their sizes: H heads of width d, G key/value heads.
_ATTRIBUTES = {
    "num_attention_heads": lambda h, g, d: h,
    "num_heads": lambda h, g, d: h,
    "n_heads": lambda h, g, d: h,
    "num_key_value_heads": lambda h, g, d: g,
    "num_key_value_groups": lambda h, g, d: h // g,
    "all_head_size": lambda h, g, d: h * d,
    "split_size": lambda h, g, d: h * d,
}
#: How linear layers call the sizes of the dimensions of their weights.
_LINEAR = {"Linear": ("out_features", "in_features"), "Conv1D": ("nx", "nf")}


def save_for_transformers(
    model: nn.Module,
    dir: str | os.PathLike,
    *,
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
) -> bool:
    """Writes a pruned model of transformers as a folder that ``from_pretrained`` reads.

    If the model's class can be built at its size, the folder is that of ``save_pretrained``. If not
    (layers with different numbers of heads, a class whose heads have the width ``hidden_size /
    num_attention_heads``), it also has ``modeling_pruned.py``, a subclass of twenty lines that
    gives the original layers their sizes::

        AutoModelForSequenceClassification.from_pretrained(dir, trust_remote_code=True)

    Reading needs transformers and not headwise; a Trainer fine-tunes the result and saves it in the
    same form. What was written is read again and must compute what ``model`` does. A layer without
    heads keeps one whose weights are zero, and query heads that share key/value heads in groups of
    several sizes get their own.

    Args:
        model: a converted model of transformers without gates, pruned or not: encoders of text,
            images and speech, decoders, encoder-decoders. Neurons may have been removed, blocks
            and hidden dimensions not.
        dir: the folder; it must not exist, or be empty, or be one that this wrote.
        tokenizer: a tokenizer (or processor) of transformers to save in the folder too.
        card: options of :func:`headwise.serialization.model_card`: ``{"plan": plan, "metrics":
            {"accuracy": 0.82}}``. The card, ``README.md``, is always written.

    Returns:
        Whether the folder has code, so that reading it needs ``trust_remote_code=True``.

    Raises:
        TypeError: ``dir`` is not a path.
        ValueError: ``model`` is not a converted model of transformers, has gates, was pruned in a
            way that resizing cannot express, or computes something else when it is read again; or
            ``dir`` is something else.
        OSError: it cannot be written.
    """
    target = Path(os.path.abspath(checked_path("dir", dir)))
    transformers: Any = sys.modules.get("transformers")
    kind = type(model)
    known = transformers is not None and getattr(transformers, kind.__name__, None) is kind
    if not known or not attention_layers(model):
        raise ValueError(
            f"model must be a converted model of transformers, got {kind.__name__}"
            + (": call headwise.convert first" if known else "")
        )
    if target.exists() and not (target.is_dir() and _may_replace(target)):
        raise ValueError(
            "dir must not exist, be empty, or be a folder that save_for_transformers wrote, got "
            f"{str(target)[-200:]!r}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(_C.folder_beside(target))
    try:
        coded = _write(model, beside)
        write_card(beside, model, **(card or {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        _C.replace_folder(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return coded


def _may_replace(folder: Path) -> bool:
    card = folder / "README.md"
    ours = card.is_file() and "Written by headwise" in card.read_text("utf-8", errors="replace")
    return (ours and not (folder / "headwise.json").exists()) or not any(folder.iterdir())


def _write(model: Any, folder: Path) -> bool:
    """Writes configuration, weights and, if it is needed, the code; returns whether it is."""
    state = original_state(model)
    if isinstance(state, str):
        raise ValueError(f"save_for_transformers cannot write this model: {state}")
    reason = unlike_the_original(model, state)
    if reason is None:
        SavePretrained(model)(folder)
        return False
    with torch.device("meta"):
        config = type(model.config).from_dict(model.config.to_dict())
        config._attn_implementation = "eager"
        original = type(model)(config)
    try:
        parameters, attributes = _fitted(model, original, state)
    except KeyError as error:
        raise ValueError(
            f"save_for_transformers cannot write this model: {reason}, and {error.args[0]}"
        ) from None
    method = type(model).save_pretrained
    # Versions that rename parameters in files do not do so for classes that are not their own.
    plain = "save_original_format" in inspect.signature(method).parameters
    method(model, folder, state_dict=state, **({"save_original_format": False} if plain else {}))
    (folder / f"{MODULE}.py").write_text(CODE.format(kind=type(model).__name__), "utf-8")
    name = type(model).__name__
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto in _auto_classes(model)}
    config["pruned"] = {"parameters": parameters, "attributes": attributes}
    write_json(folder / "config.json", config, indent=2)
    _check(model, folder, name)
    return True


def _fitted(
    model: nn.Module, original: nn.Module, state: dict[str, Tensor]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """What the original modules must be cut to: module -> parameter -> shape, and module ->
    attribute -> value. Changes ``state`` in place, so that it fits.

    Raises:
        KeyError: cutting cannot express it, with the reason.
    """
    expected = original.state_dict()
    layers = attention_layers(model)
    for name, tensor in list(state.items()):
        if name not in expected:
            raise KeyError(f"'{name}' is not in its class")
        layer = _layer_of(name, layers)
        if layer is not None:
            state[name] = _regular(name, tensor, expected[name].shape, layer, model)
    parameters: dict[str, dict] = {}
    attributes: dict[str, dict] = {}
    for name, tensor in state.items():
        if tensor.shape == expected[name].shape:
            continue
        place, _, own = name.rpartition(".")
        module = original.get_submodule(place)
        sizes = _LINEAR.get(type(module).__name__)
        if sizes is None:
            raise KeyError(f"'{name}' cannot be given the shape {list(tensor.shape)}")
        parameters.setdefault(place, {})[own] = list(tensor.shape)
        if own == "weight":
            attributes[place] = dict(zip(sizes, tensor.shape, strict=True))
    for name, layer in layers.items():
        for place in _parents(name):
            if any(linear.startswith(f"{place}.") for linear in parameters):
                module = original.get_submodule(place)
                found = _sizes_of(layer)
                values = {
                    own: size(*found)
                    for own, size in _ATTRIBUTES.items()
                    if isinstance(vars(module).get(own), int)
                }
                if values:
                    attributes[place] = values
                    break
    return parameters, attributes


def _parents(name: str) -> Iterator[str]:
    """A module's name and those around it, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _layer_of(name: str, layers: Mapping[str, AttentionLayer]) -> AttentionLayer | None:
    """The attention layer that a parameter of the original model belongs to."""
    for place in list(_parents(name))[1:4]:
        for own, layer in layers.items():
            if own == place or own.startswith(f"{place}."):
                return layer
    return None


def _sizes_of(layer: AttentionLayer) -> tuple[int, int, int]:
    """H, G and d of a layer as it is written."""
    if layer.num_heads == 0:
        return 1, 1, layer.head_dim
    groups = layer.num_heads if _irregular(layer) else len(set(layer.head_groups))
    return layer.num_heads, groups, layer.head_dim


def _irregular(layer: AttentionLayer) -> bool:
    """Whether groups of query heads differ in size."""
    groups = list(layer.head_groups)
    return len({groups.count(group) for group in groups}) > 1


def _regular(
    name: str, tensor: Tensor, whole: torch.Size, layer: AttentionLayer, model: nn.Module
) -> Tensor:
    """A parameter of a layer without heads as that of one head of zeros, and keys and values of
    groups that differ in size for each query head."""
    d = layer.head_dim
    if layer.num_heads == 0 and tensor.shape != whole:
        config: Any = model.config
        before = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
        shape = [
            max(d, size // (before or size)) if own == 0 else own
            for own, size in zip(tensor.shape, whole, strict=True)
        ]
        return tensor.new_zeros(shape)
    if _irregular(layer) and name.rpartition(".")[0].endswith(("k_proj", "v_proj")):
        rows = torch.tensor([g * d + i for g in layer.head_groups for i in range(d)])
        return tensor.index_select(0, rows.to(tensor.device))
    return tensor


def _auto_classes(model: Any) -> list[str]:
    """The AutoModel classes that give the model's class for its configuration."""
    transformers: Any = sys.modules["transformers"]
    found = []
    # Other names import modules with effects: one of them turns transformers' log on.
    for name in (own for own in dir(transformers) if own.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if mapping is not None:
            with contextlib.suppress(KeyError):
                classes = mapping[type(model.config)]
                if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
                    found.append(name)
    return found


def _check(model: Any, folder: Path, name: str) -> None:
    """Raises an error if what was written does not compute what ``model`` does."""
    spec: Any = importlib.util.spec_from_file_location(
        f"_headwise_{MODULE}", folder / f"{MODULE}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = {key: value.to(model.device) for key, value in _made_up(model).items()}
    with _quiet():
        again = getattr(module, name).from_pretrained(folder, dtype=model.dtype).to(model.device)
    again.config._attn_implementation = "eager"
    with torch.no_grad(), evaluating(model), evaluating(again):
        try:
            expected, actual = model(**inputs)[0], again(**inputs)[0]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                "save_for_transformers cannot write this model: it does not run at these sizes "
                f"({printable(str(error).splitlines()[0], 200)})"
            ) from None
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    apart = (actual.double() - expected.double()).abs().max().item()
    most = max(1.0, expected.double().abs().max().item())
    if not apart <= tolerance * most:
        raise ValueError(
            "save_for_transformers cannot write this model: read again, it computes something else "
            f"(its outputs differ by {apart:.1e})"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar: reading again is a check."""
    logging = sys.modules["transformers"].utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _made_up(model: Any) -> dict[str, Tensor]:
    """Inputs on which the written model must agree."""
    config = copy.copy(model.config)
    draw = torch.Generator().manual_seed(0)
    main = model.main_input_name
    if main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        inputs = {main: torch.randint(vocabulary, (2, 7), generator=draw)}
    elif main == "input_values":
        inputs = {main: torch.randn(2, 8000, generator=draw).to(model.dtype)}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        size = (2, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {main: torch.randn(size, generator=draw).to(model.dtype)}
    elif main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        inputs = {main: torch.randn(2, channels, *size, generator=draw).to(model.dtype)}
    else:
        raise ValueError(
            f"save_for_transformers cannot check {type(model).__name__}: it does not know the "
            f"shape of its {main}"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    return inputs
