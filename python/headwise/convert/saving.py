"""``save_pretrained`` of a converted model of transformers: writes what the original class reads,
or raises an error. Otherwise ``from_pretrained`` would return random attention.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.io.files import write_json
from headwise.io.printable import layer_called
from headwise.io.safetensors_files import save_safetensors
from headwise.nn.layers import attention_layers

#: The attention implementation in a checkpoint and, as versions before 5.4 ignore that, its file of
#: weights: neither exists, so only a resuming Trainer reads the checkpoint.
UNREADABLE = "headwise_gates"


class SavePretrained:
    """Replaces the method of a model of transformers.

    A model without gates is written with the names and the layout of its original class. One that
    was pruned is written if its class can be built at its size: with the same number of heads in
    every layer, if the class takes the width of a head from the configuration (``head_dim``).

    Attributes:
        model: the model.
        checkpoints: a Trainer with a gate callback is running: a model that the original class
            cannot read is written for the Trainer to resume from, with a configuration that
            ``from_pretrained`` refuses.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.checkpoints = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.save_pretrained``.

        Raises:
            ValueError: the original class could not read the result.
        """
        model: Any = self.model
        method = type(model).save_pretrained
        if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are written
            return method(model, *args, **kwargs)
        call = inspect.signature(method).bind(model, *args, **kwargs)
        given = call.arguments.get("state_dict")
        state = dict(model.state_dict() if given is None else given)
        reason = _give_original_names(model, state)
        if reason is None:
            call.arguments["state_dict"] = state
            sizes: Any = _sizes(model, state)
            reason = sizes if isinstance(sizes, str) else None
        if reason is None:
            with _configured(model.config, sizes):
                return method(*call.args, **call.kwargs)
        if self.checkpoints:
            if call.arguments.get("is_main_process", True):
                folder = Path(call.arguments["save_directory"])
                _write_checkpoint(model, model.state_dict() if given is None else given, folder)
            return None
        raise ValueError(
            f"save_pretrained cannot write this model so that {type(model).__name__}."
            f"from_pretrained reads it: {reason}. Use headwise.save(model, dir) and "
            f"headwise.load(dir), or of a pruned model headwise.serialization."
            f"save_for_transformers(model, dir); with a Trainer, add "
            f"headwise.serialization.trainer.GateCallback()"
        )


def save_as_the_original(model: nn.Module) -> None:
    """Gives the converted models of transformers in ``model`` their :class:`SavePretrained`."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel) and attention_layers(part):
            if not isinstance(vars(part).get("save_pretrained"), SavePretrained):
                vars(part)["save_pretrained"] = SavePretrained(part)


def original_state(model: nn.Module) -> dict[str, Tensor] | str:
    """The state with the names of the original class; or, as text, why there is none."""
    state = dict(model.state_dict())
    return _give_original_names(model, state) or state


def unlike_the_original(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Why the original class cannot read ``state``, whatever its configuration; None if it can."""
    sizes = _sizes(model, state)
    return sizes if isinstance(sizes, str) else None


def _give_original_names(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Changes ``state`` in place; returns why the original class could not read it."""
    for name, layer in attention_layers(model).items():
        if layer.gate is not None:
            return f"{layer_called(name)} has a {type(layer.gate).__name__}"
    try:
        for name, module in model.named_modules():
            if hasattr(module, "original_state"):
                module.original_state(name, state)
    except KeyError as error:
        return f"{error} is missing (an adapter may be around it)"
    return None


def _sizes(model: nn.Module, state: dict[str, Tensor]) -> dict[str, int] | str:
    """The configuration values of a pruned model with which the original class reads ``state``;
    empty if it was not pruned. Or, as text, why the class cannot read it."""
    reason = _misfit(model, state, {})
    if reason is None:
        return {}
    layers = attention_layers(model)
    heads = {name: layer.num_heads for name, layer in layers.items()}
    if len(set(heads.values())) > 1:
        fewest, most = min(heads, key=heads.__getitem__), max(heads, key=heads.__getitem__)
        return (
            f"its layers have different numbers of heads ({heads[fewest]} in '{fewest}', "
            f"{heads[most]} in '{most}')"
        )
    layer = next(iter(layers.values()))
    groups = len(set(layer.head_groups))
    regular = [head * groups // max(1, layer.num_heads) for head in range(layer.num_heads)]
    whole = groups == 0 or layer.num_heads % groups == 0
    if not whole or any(own.head_groups != regular for own in layers.values()):
        return "its query heads do not share key/value heads in groups of one size"
    sizes = {"num_attention_heads": layer.num_heads, "head_dim": layer.head_dim}
    if getattr(model.config, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = groups
    return sizes if _misfit(model, state, sizes) is None else reason


@contextlib.contextmanager
def _configured(config: Any, sizes: dict[str, int]) -> Iterator[None]:
    """``config`` with other sizes inside the block."""
    before = {name: getattr(config, name) for name in sizes if hasattr(config, name)}
    try:
        for name, size in sizes.items():
            setattr(config, name, size)
        yield
    finally:
        for name in sizes:
            if name in before:
                setattr(config, name, before[name])
            else:
                delattr(config, name)


def _misfit(model: nn.Module, state: dict[str, Tensor], sizes: dict[str, int]) -> str | None:
    """Why the original class, built with these sizes in its configuration, could not read
    ``state``."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    try:
        with _configured(config, sizes), torch.device("meta"):
            # A configuration from a file is validated when it is read.
            config = type(config).from_dict(config.to_dict())
            config._attn_implementation = "eager"
            expected = type(model)(config).state_dict()
    except Exception as error:
        return f"its class cannot be built at this size ({error})"
    for name in expected:
        if name not in state:
            if _built_without(model, name):  # as the original model would be saved
                continue
            return f"'{name}' is missing"
        if state[name].shape != expected[name].shape:
            return f"'{name}' has shape {list(state[name].shape)}, not {list(expected[name].shape)}"
    unknown = [name for name in state if name not in expected]
    return f"'{unknown[0]}' is not in it" if unknown else None


def _built_without(model: nn.Module, name: str) -> bool:
    """Whether a part on the way to a parameter is None in ``model``: BERT's pooler."""
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, model)
        if part is None:
            return True
        if part is model:  # no such part, which is not the same
            return False
    return False


def _write_checkpoint(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    tensors: dict[tuple, tuple[str, Tensor]] = {}
    for name, tensor in state.items():  # tied ones once: the model ties them again
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        tensors.setdefault(place if tensor.numel() else (name,), (name, tensor))
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(
        folder / "model.safetensors",
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.values()},
    )
    config = json.loads(model.config.to_json_string())
    config.update(attn_implementation=UNREADABLE, transformers_weights=UNREADABLE)
    write_json(folder / "config.json", config, indent=2)
