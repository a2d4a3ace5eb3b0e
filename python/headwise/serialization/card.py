"""A model card: the README.md that the Hub shows for a model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from headwise import _C
from headwise.io.files import existing_folder, write_atomic
from headwise.io.printable import printable, quoted
from headwise.nn.layers import attention_layers
from headwise.pruning.plans import HeadPlan

__all__ = ["model_card", "write_card"]

CARD = "README.md"


def model_card(
    model: nn.Module,
    *,
    plan: HeadPlan | None = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> str:
    """The text of a model card: heads per layer, gates, method and plan, and metrics.

    Args:
        model: a converted model, pruned or not.
        plan: the plan that it was pruned by; its metric is the method.
        metrics: name -> number, as measured: ``{"accuracy": 0.82}``.
        base_model: the model that it came from; default: the name in its configuration, unless it
            is a folder of this machine, which the Hub does not know.

    Raises:
        ValueError: ``model`` has no converted layer, or a metric is not a number.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention: call "
            f"headwise.convert first"
        )
    before = {} if plan is None else {entry.name: entry.num_heads for entry in plan.layers}
    heads = sum(layer.num_heads for layer in layers.values())
    whole = sum(before.get(name, layer.num_heads) for name, layer in layers.items())
    base = base_model or _name_on_the_hub(model)
    gates = sorted({type(own.gate).__name__ for own in layers.values() if own.gate is not None})
    front = ["---", "library_name: headwise", "tags: [attention-heads, pruning]"]
    front += [f"base_model: {json.dumps(base)}"] if base else []
    lines = [*front, "---", "", f"# {_text(base or type(model).__name__)}, {heads} heads", ""]
    lines.append(f"{heads} of {whole} attention heads are left." if heads < whole else
                 f"All {heads} attention heads are there.")  # fmt: skip
    if gates:
        lines.append(f"Every input chooses which of them run ({', '.join(gates)}).")
    if plan is not None and plan.metric:
        lines.append(f"Heads were pruned by `{_text(plan.metric)}`.")
    lines += ["", "| layer | heads | before |", "|---|---|---|"]
    for name, layer in layers.items():
        lines.append(
            f"| `{_text(name)}` | {layer.num_heads} | {before.get(name, layer.num_heads)} |"
        )
    if metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"metrics must map names to numbers, got {quoted(value)}")
            lines.append(f"| {_text(name)} | {value:.4g} |")
    if plan is not None:
        lines += ["", "<details><summary>Plan</summary>", "", "```json", plan.to_json(), "```"]
        lines += ["", "</details>"]
    lines += ["", "```python", "import headwise as hw", "", 'model = hw.load("PATH")', "```", ""]
    lines.append(f"Written by headwise {_C.__version__}.")
    return "\n".join(lines) + "\n"


def write_card(dir: str | os.PathLike, model: nn.Module, **about: Any) -> None:
    """Writes :func:`model_card` as ``README.md`` to a folder that :func:`headwise.save` or
    ``save_pretrained`` wrote. In the latter case, the card shows how to load it.

    Args:
        dir: the folder.
        model: the model in it.
        about: options of :func:`model_card`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: see :func:`model_card`.
        OSError: it cannot be written.
    """
    folder = existing_folder("dir", dir)
    text = model_card(model, **about)
    if not (folder / "headwise.json").is_file():
        kind, options = _reader(folder, model)
        text = text.replace("library_name: headwise", "library_name: transformers")
        text = text.replace(
            'import headwise as hw\n\nmodel = hw.load("PATH")',
            f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("PATH"{options})',
        )
    write_atomic(folder / CARD, text)


def _reader(folder: Path, model: nn.Module) -> tuple[str, str]:
    """The class whose ``from_pretrained`` reads the folder, and further arguments of it."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if kinds := list(config.get("auto_map", ())):  # the folder has code
            # AutoModel reads every base model; a task's own class says more.
            return kinds[-1], ", trust_remote_code=True"
    return type(model).__name__, ""


def _name_on_the_hub(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    local = not name or os.path.isabs(name) or name.startswith(".") or os.path.isdir(name)
    return None if local else name


def _text(value: str) -> str:
    """A name in a line of Markdown: it cannot end a cell, code or a tag."""
    return printable(value, 200).replace("|", "¦").replace("`", "'").replace("<", "‹")
