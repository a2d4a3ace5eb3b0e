"""Gates alone, relative to the dense layer that they control."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import headwise as hw
from headwise.apps.bench.cases import GOALS
from headwise.apps.bench.contenders import CheckFailed, Layer, Shape, dense
from headwise.apps.bench.settings import Settings

DENSE = "dense"
#: Gates that depend on the input.
GATES = ("BudgetGate", "HardConcreteGate")
LEAST_LENGTH = 128


def run(settings: Settings) -> Iterator[dict]:
    """Every shape of at least 128 tokens, dtype, number of threads and gate: one result each."""
    for shape in settings.shapes:
        if shape.length < LEAST_LENGTH and len(settings.shapes) > 1:
            continue  # the goal is for lengths at which a layer has a relevant cost
        for dtype in settings.dtypes:
            for threads in settings.threads:
                torch.set_num_threads(threads)
                yield from _case(settings, shape, dtype, threads)


def build(name: str, shape: Shape, device, dtype) -> hw.Gate:
    """A gate of that type for half of the heads, bound to the shape's layer."""
    options: dict = {"type": name}
    if name == "HardConcreteGate":
        options["input_dependent"] = True
    gate = hw.gates.gate_from_config(options)
    return gate.bind(shape.width, shape.heads, device=device, dtype=dtype).eval()


def _case(settings: Settings, shape: Shape, dtype, threads: int) -> Iterator[dict]:
    layer = Layer(shape, dtype, settings.device, settings.seed)
    gates = {name: build(name, shape, settings.device, dtype) for name in settings.gates or GATES}

    def call(gate: hw.Gate):
        def run() -> None:
            with torch.no_grad():
                gate(layer.x)

        return run

    def whole() -> None:
        with torch.no_grad():
            dense(layer.x, layer.weights)

    for gate in gates.values():
        with torch.no_grad():
            check(gate(layer.x), shape)
    runs = {name: call(gate) for name, gate in gates.items()} | {DENSE: whole}
    times = settings.timer().measure(runs, layer.touch)
    ms = times.milliseconds()
    for name in gates:
        ratio = times.ratio(name, {DENSE: 1.0})
        yield {
            "what": "gate",
            "gate": name,
            "shape": shape.as_list(),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            "ms": {name: ms[name], DENSE: ms[DENSE]},
            "ratio": {"yardstick": ratio},
            "yardstick": DENSE,
            "goal": GOALS["gate"].judge(ratio["median"]) if shape.length >= LEAST_LENGTH else None,
        }


def check(selection: hw.Selection, shape: Shape) -> None:
    """Checks the selection: chosen heads ascending, then -1; weights elsewhere are 0."""
    index: Tensor = selection.index.long()  # [B, H]
    position = torch.arange(shape.heads, device=index.device)
    chosen = position < selection.count[:, None]  # [B, H]
    ascending = (index[:, 1:] > index[:, :-1]) | ~chosen[:, 1:]
    mask = torch.ops.headwise.selection_mask(selection.index, selection.count, torch.float32)
    if not (
        index.shape == (shape.batch, shape.heads)
        and bool(((index >= 0) == chosen).all())
        and bool(ascending.all())
        and bool((selection.weight * (1 - mask) == 0).all())
    ):
        raise CheckFailed("a gate's selection is not well formed")
