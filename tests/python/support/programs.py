"""The programs that tests/cpp builds, and what they are given and write."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import headwise as hw
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def find_program(name: str) -> Path | None:
    """In HEADWISE_BUILD_DIR, or in the newest build folder that has it."""
    root = Path(__file__).resolve().parents[3]
    folder = os.environ.get("HEADWISE_BUILD_DIR")
    folders = [Path(folder)] if folder else [root / "build", *sorted(root.glob("build*"))]
    found = [path for f in folders if (path := f / "tests" / "cpp" / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run_program(program: Path | None, *arguments: object, status: int = 0) -> str:
    """What it wrote to standard error."""
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def random_layer(layer: torch.nn.Module, progress: float) -> torch.nn.Module:
    """``layer`` with random parameters and gates at ``progress``."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5)
    hw.link_gates(layer)
    hw.anneal(layer, progress)
    return layer


def write_layer(
    folder: Path, layer: torch.nn.Module, inputs: Mapping[str, Tensor], **description: object
) -> None:
    """What ``layer_parity`` and ``decoder_parity`` read: layer.json and input.safetensors."""
    state = {f"state.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_file({**inputs, **state}, str(folder / "input.safetensors"))
    config = None if layer.gate is None else layer.gate.config()
    sizes = {"embed_dim": layer.embed_dim, "num_heads": layer.num_heads}
    (folder / "layer.json").write_text(json.dumps({**sizes, **description, "gate": config}))


def differentiated(
    layer: torch.nn.Module, output: Tensor, weights: Tensor, cotangent: Tensor, chosen: object
) -> dict[str, Tensor]:
    """Backward of the product with ``cotangent`` and the penalty; the tensors that the programs
    write. ``chosen`` is the call's selection, or None."""
    penalty = hw.penalty(layer)
    ((output * cotangent).sum() + penalty).backward()
    found = {"output": output, "weights": weights, "penalty": penalty.double()}
    if chosen is not None:
        found |= {name: getattr(chosen, name) for name in ("index", "count", "weight")}
    grads = {f"grad.{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return found | grads


def assert_written(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """output.safetensors has these tensors, and no others; returns them."""
    got = load_file(str(folder / "output.safetensors"))
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor.detach(), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


def drop_state(folder: Path, name: str) -> None:
    """Removes a parameter or buffer from input.safetensors."""
    tensors = load_file(str(folder / "input.safetensors"))
    del tensors[f"state.{name}"]
    save_file(tensors, str(folder / "input.safetensors"))
