"""``save_pretrained`` of a converted model of transformers: what the original class reads, or a
refusal. Without this, ``from_pretrained`` would answer with random attention.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.io.safetensors_files import save_safetensors
from headwise.nn.layers import attention_layers

#: The implementation of attention that a checkpoint names: there is none, so nothing but a Trainer
#: that resumes reads it.
UNREADABLE = "headwise_gates"


class SavePretrained:
    """In the place of the method of a model of transformers.

    A model that has no gates and was not pruned is written with the names and the layout of its
    original class.

    Attributes:
        model: whose method it is.
        checkpoints: a Trainer is at work (:class:`headwise.convert.trainer.GateCallback`): what the
            original class could not read is written for the Trainer to resume from, with a
            configuration that ``from_pretrained`` refuses.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.checkpoints = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.save_pretrained``.

        Raises:
            ValueError: the original class could not read what would be written.
        """
        model, method = self.model, type(self.model).save_pretrained
        if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are written
            return method(model, *args, **kwargs)
        call = inspect.signature(method).bind(model, *args, **kwargs)
        given = call.arguments.get("state_dict")
        state = dict(model.state_dict() if given is None else given)
        reason = _give_original_names(model, state)
        if reason is None:
            call.arguments["state_dict"] = state
            return method(*call.args, **call.kwargs)
        if self.checkpoints:
            if call.arguments.get("is_main_process", True):
                folder = Path(call.arguments["save_directory"])
                _write_checkpoint(model, model.state_dict() if given is None else given, folder)
            return None
        raise ValueError(
            f"save_pretrained cannot write this model so that {type(model).__name__}."
            f"from_pretrained reads it: {reason}. Use headwise.save(model, dir) and "
            f"headwise.load(dir); with a Trainer, add headwise.convert.trainer.GateCallback()"
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


def _give_original_names(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Changes ``state`` in place; returns why the original class could not read it."""
    for name, layer in attention_layers(model).items():
        if layer.gate is not None:
            return f"layer '{name}' has a {type(layer.gate).__name__}"
    try:
        for name, module in model.named_modules():
            if hasattr(module, "original_state"):
                module.original_state(name, state)
    except KeyError as error:
        return f"{error} is missing (an adapter may stand around it)"
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        expected = type(model)(config).state_dict()
    for name in expected:
        if name not in state:
            return f"'{name}' is missing"
        if state[name].shape != expected[name].shape:
            return f"'{name}' has shape {list(state[name].shape)}, not {list(expected[name].shape)}"
    unknown = [name for name in state if name not in expected]
    return f"'{unknown[0]}' is not in it" if unknown else None


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
    config = {**json.loads(model.config.to_json_string()), "attn_implementation": UNREADABLE}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
