"""Check of a structure plan: the masked and the pruned model compute the same on a few made-up
tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.registry import class_path
from headwise.nn.gate_proof import layer_outputs
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.proof import Draw, Proof, bare
from headwise.pruning.structured.compaction import READERS
from headwise.pruning.structured.description import FeedForward, Stream, Structure, structure
from headwise.pruning.structured.masks import StructureMasks, attach
from headwise.pruning.structured.plan import StructurePlan


class PlanProof:
    """The outputs of a model masked by ``plan``, part by part.

    With hidden dimensions, these are its residual stream from end to end and its readers. Without
    them, its transformer layers, and the attention layers and feed-forward networks outside these.

    Args:
        model: without masks; not changed.
        plan: fits ``model``.
    """

    def __init__(self, model: nn.Module, plan: StructurePlan) -> None:
        parts = _parts(structure(model), plan)
        masks = StructureMasks.from_plan(plan)

        def masked(own: nn.Module, draw: Draw) -> list[Tensor]:
            own = bare(own)
            attach(own, structure(own), masks, hidden=plan.hidden is not None)
            return [output for part in parts for output in part(own, draw, masks)]

        def compacted(own: nn.Module, draw: Draw) -> list[Tensor]:
            return [output for part in parts for output in part(own, draw, None)]

        self._after = compacted
        self._proof = Proof.of(model, "", masked)

    def check(self, model: nn.Module) -> None:
        """Compares ``model``, pruned by the plan.

        Raises:
            ValueError: its outputs differ.
        """
        if self._proof is not None:
            self._proof.check(model, self._after)


#: Runs a part of a model on made-up tokens, with the masks on the model.
_Part = Callable[[nn.Module, Draw, StructureMasks | None], list[Tensor]]


def _parts(found: Structure, plan: StructurePlan) -> list[_Part]:
    if plan.hidden is not None and found.stream is not None:
        return [_stream(found.stream)]
    entries: list[Any] = [*plan.heads.layers, *plan.ffn, *plan.blocks]
    touched = {entry.name for entry in entries}
    layers = [layer for layer in found.layers if touched & {layer.attention, layer.ffn}]
    inside = {name for layer in layers for name in (layer.attention, layer.ffn)}
    alone = touched - inside
    return [
        *(_layer(layer.name, found.attention[layer.attention].embed_dim) for layer in layers),
        *(_attention(name) for name in found.attention if name in alone),
        *(_network(found.ffn[name]) for name in found.ffn if name in alone),
    ]


def _layer(name: str, width: int) -> _Part:
    def run(model: nn.Module, draw: Draw, masks: StructureMasks | None) -> list[Tensor]:
        output = model.get_submodule(name)(draw(2, 5, width))
        return [output[0] if isinstance(output, tuple) else output]

    return run


def _attention(name: str) -> _Part:
    def run(model: nn.Module, draw: Draw, masks: StructureMasks | None) -> list[Tensor]:
        layer = model.get_submodule(name)
        made = layer_outputs(layer, draw)
        scale = None if masks is None else masks.blocks.get(name)
        if scale is None or not isinstance(layer, GroupedQueryAttention):
            return made
        return [output * scale.to(output) for output in made]  # it was called past its hooks

    return run


def _network(ffn: FeedForward) -> _Part:
    width = ffn.first.in_features

    def run(model: nn.Module, draw: Draw, masks: StructureMasks | None) -> list[Tensor]:
        first, second = (model.get_submodule(name) for name in (ffn.name, ffn.second_name))
        return [second(first(draw(2, 5, width)).tanh())]

    return run


def _stream(stream: Stream) -> _Part:
    def run(model: nn.Module, draw: Draw, masks: StructureMasks | None) -> list[Tensor]:
        entry = model.get_submodule(stream.entry)
        if stream.kind == "encoder":
            return [entry(draw(2, 5, stream.size))]
        tables = entry.embeddings
        room = tables.position_embeddings.num_embeddings - 2  # RoBERTa's begin at 2
        length = max(1, min(5, room))
        words = torch.arange(2 * length, device=draw.device).view(2, length)
        words = 2 + words % max(tables.word_embeddings.num_embeddings - 2, 1)  # none is padding
        seen = (~draw.padding(2, length, padded=length // 2)).long()
        hidden = entry(input_ids=words, attention_mask=seen)[0]
        reader = READERS.get(class_path(type(model)))
        return [hidden if reader is None else model.get_submodule(reader)(hidden)]

    return run
