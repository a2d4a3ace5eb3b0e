"""Gates in a ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from headwise.convert.saving import SavePretrained
from headwise.gates.model import anneal, gates
from headwise.io.files import write_atomic
from headwise.serialization.save_load import DESCRIPTION, WEIGHTS, description


class GateCallback(TrainerCallback):
    """Anneals the gates of a Trainer's model from its first step to its last, and lets the Trainer
    write checkpoints of a gated model.

    ::

        Trainer(model, ..., callbacks=[GateCallback()],
                optimizers=(torch.optim.AdamW(hw.parameter_groups(model, lr=5e-5)), None))

    The penalty of the gates belongs in the loss (``compute_loss``). The Trainer resumes from a
    checkpoint of a gated model, and :func:`headwise.load` reads one; ``from_pretrained``, which
    does not know gates, refuses it (it names an attention implementation that does not exist). Save
    the result with :func:`headwise.save`.

    Raises:
        ValueError: at the start of training, if the model has no gates.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if not gates(model):
            raise ValueError(
                f"model ({type(model).__name__}) has no gates: call headwise.convert(model, gate)"
            )
        _allow_checkpoints(model, True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        anneal(kwargs["model"], min(1.0, state.global_step / max(1, state.max_steps)))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (folder / WEIGHTS).is_file():
            write_atomic(folder / DESCRIPTION, description(kwargs["model"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After an early stop, gates stay as they were trained.
        if state.global_step >= state.max_steps:
            anneal(kwargs["model"], 1.0)
        _allow_checkpoints(kwargs["model"], False)


def _allow_checkpoints(model: nn.Module, allowed: bool) -> None:
    for part in model.modules():
        saving = vars(part).get("save_pretrained")
        if isinstance(saving, SavePretrained):
            saving.checkpoints = allowed
