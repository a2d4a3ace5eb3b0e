"""Checks of headwise's layers: with a gate, with a cache, with a kept selection."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.group import GroupGate
from headwise.gates.selection import Selection
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import attention_layers
from headwise.nn.proof import (
    Draw,
    Place,
    Proof,
    bare,
    called,
    disagreement,
    kind_of,
    multihead_outputs,
    outputs,
    place_of,
    refusal,
)

_ops = torch.ops.headwise

#: Tokens of the prompt, and of prompt and step together, for trying a layer with a cache.
_PROMPT, _WHOLE = 4, 5


def layer_outputs(layer: nn.Module, draw: Draw) -> list[Tensor]:
    """A trial of a headwise layer, called directly wherever it is in the model."""
    if not isinstance(layer, GroupedQueryAttention):
        widths = layer.embed_dim, layer.kdim, layer.vdim
        return multihead_outputs(layer, draw, widths, layer.batch_first, maps=False)
    call = _caller(layer, draw)
    cache = layer.trial_cache()
    padded = call(0, _WHOLE, key_padding_mask=draw.padding(2, _WHOLE))
    return [padded, call(0, _PROMPT, cache=cache), call(_PROMPT, _WHOLE, cache=cache)]


def _caller(layer: GroupedQueryAttention, draw: Draw) -> Callable[..., Tensor]:
    """``call(start, stop, **options)`` runs the layer on these of the made-up tokens."""
    x = draw(2, _WHOLE, layer.embed_dim)
    width = layer.head_dim - layer.head_dim % 2
    angles = draw.rope(_WHOLE, width) if width else None

    def call(start: int, stop: int, cache: Any = None, **options: Any) -> Tensor:
        rope = None if angles is None else (angles[0][:, start:stop], angles[1][:, start:stop])
        part = x[:, start:stop]
        held = None if cache is None else cache(part)
        return GroupedQueryAttention.forward(layer, part, rope, cache=held, **options)[0]

    return call


def check_gates(model: nn.Module) -> None:
    """Runs each kind of gated layer on a few made-up tokens: the output must equal that of all
    heads, multiplied by the gate's weights; it must be the same with and without a cache; and the
    choice must follow the gate and ``keep_selection``.

    Gates that decide together with those of other layers are skipped.

    Raises:
        ValueError: a layer computes something else.
    """
    kinds: set[Hashable] = set()
    for name, layer in attention_layers(model).items():
        gate = layer.gate
        alone = gate is not None and getattr(gate, "scope_key", lambda: None)() is None
        if not alone or (kind := kind_of(layer)) in kinds:
            continue
        kinds.add(kind)
        proof = Proof.of(layer, name, _every_head)
        if proof is not None:
            proof.check(layer, _chosen_heads)
            place = place_of(layer)
            assert place is not None  # else there were no proof
            _check_choices(layer, name, place)


def _seeded(call: Callable[[], list[Tensor]], draw: Draw) -> list[Tensor]:
    devices = [draw.device] if draw.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # gates may draw: the same twice
        torch.manual_seed(0)
        return call()


def _chosen_heads(layer: nn.Module, draw: Draw) -> list[Tensor]:
    return _seeded(lambda: layer_outputs(layer, draw), draw)


def _every_head(layer: Any, draw: Draw) -> list[Tensor]:
    layer._probe = lambda *_: None  # a probe makes the layer compute all heads
    return _chosen_heads(layer, draw)


def _check_choices(layer: AttentionLayer, name: str, place: Place) -> None:
    copied, seen = place.bare(layer), []
    copied._observers.append(lambda _, selection, x, padding: seen.append(selection))
    written = outputs(copied, _chosen_heads, place.draw())
    if isinstance(layer.gate, GroupGate):
        _check_groups(layer, called(layer, name), seen)
    gate = layer.gate
    if isinstance(layer, GroupedQueryAttention) and gate is not None and not gate.projects:
        _, prompt, step = seen
        if layer.keep_selection:
            _check_kept(called(layer, name), prompt, step)
        _check_cache(layer, name, place, (prompt, step), written[1:])


def _check_groups(layer: AttentionLayer, name: str, seen: list[Selection]) -> None:
    """Heads that share keys and values must run together, with one weight."""
    groups = torch.tensor(layer.head_groups)
    first = torch.tensor([layer.head_groups.index(group) for group in layer.head_groups])
    for selection in seen:
        ran = _ops.selection_mask(selection.index, selection.count, torch.float64)
        weight = (selection.weight.double() * ran).cpu()  # [B, H]
        apart = (weight - weight[:, first]).abs() + (ran - ran[:, first.to(ran.device)]).abs().cpu()
        if apart.numel() and float(apart.max()) > 0:
            row, head = divmod(int(apart.argmax()), apart.size(1))
            other = int(first[head])
            raise refusal(
                name,
                f"heads {other} and {head} of group {int(groups[head])} have weights "
                f"{float(weight[row, other]):.6g} and {float(weight[row, head]):.6g}",
            )


def _check_kept(name: str, prompt: Selection, step: Selection) -> None:
    """A later step must run what the prompt chose."""
    for what in ("weight", "count", "index"):
        before, after = (getattr(chosen, what).double().flatten() for chosen in (prompt, step))
        apart = (before - after).abs()
        if apart.numel() and float(apart.max()) > 0:
            at = int(apart.argmax())
            raise refusal(
                name,
                f"with keep_selection=True a {what} is {float(before[at]):.6g} at the prompt and "
                f"{float(after[at]):.6g} at the next step",
            )


def _check_cache(
    layer: GroupedQueryAttention,
    name: str,
    place: Place,
    chosen: tuple[Selection, Selection],
    written: list[Tensor],
) -> None:
    """Prompt and step must give the same as all tokens at once with the same selections."""

    def whole(own: Any, draw: Draw) -> list[Tensor]:
        call, made = _caller(own, draw), []
        for selection in chosen:
            own.gate = _Given(selection)
            made.append(call(0, _WHOLE))
        return [made[0][:, :_PROMPT], made[1][:, _PROMPT:]]

    def exact() -> list[Tensor]:
        draw = Draw(place.dtype, place.device, cast=torch.float64)
        return outputs(bare(layer, torch.float64), whole, draw)

    expected = outputs(place.bare(layer), whole, place.draw())
    text = disagreement(expected, written, exact)
    if text is not None:
        raise refusal(called(layer, name), f"with a cache, {text}")


class _Given(nn.Module):
    """Replaces a gate: chooses what it was given."""

    projects = False
    routes_tokens = False
    execution = "selected"

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection

    def forward(self, x: Tensor, padding: Tensor | None) -> Selection:
        return self.selection
