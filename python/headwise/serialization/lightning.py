"""Gates in a Lightning ``Trainer`` (``lightning`` or ``pytorch_lightning``)."""

from __future__ import annotations

import importlib
import math
from typing import Any

from torch import nn

from headwise.gates.model import anneal, gates


def _callback() -> Any:
    """Lightning's class of callbacks, which has all other hooks; without Lightning any class."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    return object


class GateCallback(_callback()):  # type: ignore[misc]
    """Anneals the gates of a ``LightningModule`` from the first step of ``fit`` to the last, and
    logs ``heads/expected_fraction``: the share of heads that the gates expect to run.

    ::

        class Classifier(LightningModule):
            def training_step(self, batch, index):
                return self.model(**batch).loss + hw.penalty(self)

            def configure_optimizers(self):
                return torch.optim.AdamW(hw.parameter_groups(self, lr=5e-5))

        Trainer(max_steps=1000, callbacks=[GateCallback()]).fit(Classifier(model.train()), loader)

    Checkpoints hold the gates and how far they were annealed, so a resumed run continues where it
    stopped. Save the result with :func:`headwise.save`.

    Raises:
        ValueError: at the start of ``fit``, if the module has no gates, they are in evaluation
            mode (Lightning keeps the mode that ``from_pretrained`` gave), or the number of steps is
            not known (neither ``max_steps`` nor ``max_epochs``, or a loader without a length).
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if not gates(pl_module):
            raise ValueError(
                f"model ({type(pl_module).__name__}) has no gates: call headwise.convert(model, "
                f"gate)"
            )
        if not all(gate.training for gate in gates(pl_module)):
            raise ValueError(
                "model must be in training mode, in which its gates learn (Lightning keeps the "
                "mode, and from_pretrained gives evaluation mode): call model.train() before fit"
            )
        self._steps(trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        anneal(pl_module, min(1.0, trainer.global_step / self._steps(trainer)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ran = [(own.expected_heads, own.num_heads) for own in gates(pl_module)]
        shares = [(float(own.mean()), heads) for own, heads in ran if own is not None]
        if shares:
            total = max(1, sum(heads for _, heads in shares))
            share = sum(expected for expected, _ in shares) / total
            pl_module.log("heads/expected_fraction", share)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        # After an early stop, gates stay as they were trained.
        if trainer.global_step >= self._steps(trainer):
            anneal(pl_module, 1.0)

    def _steps(self, trainer: Any) -> int:
        steps = trainer.estimated_stepping_batches
        if not (math.isfinite(steps) and steps > 0):
            raise ValueError(
                f"trainer must have a number of steps, by which gates are annealed: give "
                f"max_steps, or max_epochs and a loader with a length, got {steps}"
            )
        return int(steps)
