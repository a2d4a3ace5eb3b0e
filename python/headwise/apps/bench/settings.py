"""What a run of the benchmarks measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from headwise.apps.bench.cases import FRACTIONS, SHAPES
from headwise.apps.bench.contenders import Shape
from headwise.apps.bench.timing import Timer
from headwise.apps.energy.windows import Windows


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmarks measures.

    Attributes:
        shapes: of the layer's input.
        dtypes: of input and weights.
        threads: numbers of threads, each measured.
        fractions: of the heads that run.
        rounds: timed rounds.
        most_seconds: limit of one case's rounds, see :class:`Timer`.
        clock: ``"wall"`` or ``"process"``.
        energy: measure the energy of layers and models in such windows; None: do not.
        compiled: also time ``torch.compile`` of the dense layer and FlexAttention.
        mixed: also time budgets that differ within the batch.
        memory: also measure peak memory.
        break_even: also look for the break-even batch and length.
        gates: types of the gates to time.
        model: folder of the model; None: the bundled MiniLM.
        data: file of texts; None: the film reviews.
        text: its column of texts.
        label: its column of labels.
        max_length: texts are truncated to this many tokens.
        batch_size: texts per batch.
    """

    device: torch.device
    shapes: tuple[Shape, ...] = SHAPES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    threads: tuple[int, ...] = (1,)
    fractions: tuple[float, ...] = FRACTIONS
    rounds: int = 11
    most_seconds: float | None = None
    clock: str = "wall"
    energy: Windows | None = None
    seed: int = 0
    compiled: bool = False
    mixed: bool = True
    memory: bool = True
    break_even: bool = False
    gates: tuple[str, ...] = ()
    model: Path | None = None
    data: Path | None = None
    text: str = "text"
    label: str = "label"
    max_length: int = 128
    batch_size: int = 32

    def timer(self) -> Timer:
        return Timer(self.rounds, self.clock, self.device, self.most_seconds)

    def head_counts(self, shape: Shape) -> list[int]:
        """Heads that run, for each fraction."""
        return sorted({max(1, round(fraction * shape.heads)) for fraction in self.fractions})
