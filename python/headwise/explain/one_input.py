"""``headwise.explain``: why these heads, for the inputs of one batch."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.explain.document import Explanation
from headwise.explain.recording import gate_description, holding, own_copy, recording
from headwise.explain.texts import (
    check_one_label,
    encode_texts,
    gives_one_label,
    names_of_tokens,
    tokens_cut,
    tokens_unknown,
)
from headwise.gates.bank import BankGate
from headwise.io.checked import check_whole_number
from headwise.io.printable import quoted
from headwise.io.progress import progress_bar
from headwise.nn.batches import run_model, take_rows
from headwise.nn.instrumenting import evaluating
from headwise.nn.intervention import ForwardFunction
from headwise.nn.layers import attention_layers
from headwise.pruning.bank import plan_choices

Take = Callable[[Any, Tensor], Any]


def explain(
    model: nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    forward_fn: ForwardFunction | None = None,
    take: Take | None = None,
    tokens: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    roles: Mapping[str, Any] | None = None,
    effects: bool | None = None,
    maps: str | Iterable[tuple[int, int]] = "none",
    pairs: int = 5,
    steps: int = 32,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool | None = None,
) -> Explanation:
    """Explains the choice of heads for every input of one batch.

    For each head of each layer: whether it ran, with what weight, relevance and rank; the exact
    share of every token in its relevance; its margin to being chosen or dropped and the smallest
    budget at which it would run; what it looks at; and the measured *effect* of running it on the
    log-probability of the predicted class, with everything else held fixed. For each budget that a
    network predicts, integrated gradients over the tokens. docs/interpretability.md has the schema
    and explains each number.

    A copy of the model that shares its parameters runs in evaluation mode: other threads may use
    the model meanwhile, but not change its parameters. A model that has not been converted is
    explained through a converted copy: all its heads run, and the effect of each is measured.

    Args:
        model: a converted or convertible model.
        inputs: input of ``forward_fn``: a mapping of tensors (keyword arguments), a tuple or list
            (positional ones) or a tensor, each with one row per input; or, with ``tokenizer``, a
            text or a list of texts.
        tokenizer: a tokenizer of transformers, for ``inputs`` that are texts and for the names of
            tokens.
        forward_fn: ``(model, inputs) -> class scores [B, C]`` of the given model; default: the
            model's output, or its ``logits``.
        take: ``(inputs, rows) -> inputs`` of the rows int64 ``[N]``, which may repeat; default:
            rows of the first dimension of every tensor.
        tokens: the tokens of each input, without padding; default: the tokenizer's.
        labels: names of the classes; default: those of the model's configuration.
        roles: the document of :func:`headwise.head_roles` for this model, to add each head's roles.
        effects: measure the effects: one row of the model for each head and input. Default: if the
            model gives scores of classes of which one is right.
        maps: attention maps of ``"all"`` heads, of ``"none"``, or of these (site, head) pairs.
        pairs: strongest token pairs to list for each head.
        steps: nodes of the quadrature of integrated gradients.
        batch_size: heads that one forward toggles, each on a copy of the input.
        max_length: tokens at which texts are truncated; default: the model's maximum.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        The explanation, with everything in ``.document``.

    Raises:
        TypeError: ``model`` is not a module, ``inputs`` hold no tensors, or ``tokenizer`` is not
            one of transformers.
        ValueError: empty inputs, or ones that do not fit ``take``, no attention layer,
            ``effects=True`` for a model without class scores, or an option out of range.
    """
    check_whole_number("batch_size", batch_size)
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    places = [] if maps in ("all", "none") else _pairs_of(maps)
    model = own_copy(model)
    texts: list[str] = []
    if isinstance(inputs, str) or (
        isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str)
    ):
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        inputs = encode_texts(model, texts, tokenizer, max_length)
    _check_inputs(inputs, forward_fn is not None)
    cut = tokens_cut(inputs, texts, tokenizer) if texts else None
    unknown = tokens_unknown(inputs, tokenizer)
    if tokens is None:
        tokens = names_of_tokens(inputs, tokenizer)
    forward_fn = forward_fn or run_model
    core = _C.Explanation(
        pairs=pairs,
        steps=steps,
        all_maps=maps == "all",
        maps=places,
    )
    sites: list[str] = []

    def receive(name, layer, selection, x, probe) -> None:
        gate, gate_tensors = gate_description(layer.gate)
        core.add_layer(
            name=name,
            num_heads=layer.num_heads,
            gate=gate,
            gate_tensors=gate_tensors,
            x=probe.q.new_empty(0) if x is None else x,
            query_padding_mask=probe.query_padding_mask,
            selection=None if selection is None else tuple(selection),
            q=probe.q,
            k=probe.k,
            key_padding_mask=probe.key_padding_mask,
            attn_mask=probe.attn_mask,
            is_causal=probe.is_causal,
            added_keys=layer._added_keys,
        )
        sites.append(name)

    with evaluating(model), torch.no_grad():
        with recording(model, receive):
            logits = forward_fn(model, inputs)
        if not sites:
            raise ValueError("model must call its attention layers: forward_fn called none")
        core.set_inputs(texts, [list(row) for row in tokens or ()])
        has_classes = isinstance(logits, Tensor) and logits.dim() == 2 and logits.size(1) >= 2
        if effects:
            check_one_label(getattr(model, "config", None))
        # With several labels per text there is no single prediction.
        has_classes = has_classes and gives_one_label(getattr(model, "config", None))
        if has_classes and logits.size(0) == core.num_inputs:
            core.set_prediction(logits.float(), list(labels or labels_of(model, logits.size(1))))
            banked = any(
                layer.gate is not None and layer.gate.projects
                for layer in attention_layers(model).values()
            )  # only the heads of its plans can run
            if effects or (effects is None and not banked):
                _measure(
                    core, model, sites, inputs, forward_fn, take or take_rows, batch_size, progress
                )
        elif effects:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"effects need class scores [{core.num_inputs}, C] with C >= 2 from forward_fn, "
                f"got {shape}"
            )
    document = json.loads(core.to_json())
    for place, entry in enumerate(document["inputs"]):
        entry["tokens_cut"] = None if cut is None else cut[place]
        entry["tokens_unknown"] = None if unknown is None else unknown[place]
    _add_gates(document, model)
    _add_plans(document, model, inputs, forward_fn)
    document["model"] = {
        "class": type(model).__name__,
        "layers": len(dict.fromkeys(sites)),
        "sites": len(sites),
        "heads": core.num_heads,
    }
    if roles is not None:
        _add_roles(document, roles)
    return Explanation(document)


def _pairs_of(maps: Any) -> list[tuple[int, int]]:
    """Checked (site, head) pairs."""
    pairs: list[tuple[int, int]] = []
    given: list[Any] = [None]
    if isinstance(maps, Iterable) and not isinstance(maps, str):
        given = list(maps)
    for pair in given:
        try:
            site, head = (operator.index(number) for number in pair)
        except (TypeError, ValueError):
            raise ValueError(
                f"maps must be 'all', 'none' or (site, head) pairs, got {quoted(maps)}"
            ) from None
        pairs.append((site, head))
    return pairs


def _check_inputs(inputs: Any, own_function: bool) -> None:
    """Raises an error for inputs that no model runs; a ``forward_fn`` may take others."""
    values: Any = [inputs]
    if isinstance(inputs, Mapping | list | tuple):
        values = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not own_function and not tensors:
        raise TypeError(
            "inputs must be a mapping or tuple of tensors, a tensor, or texts, got "
            f"{quoted(inputs)}"
        )
    for tensor in tensors:
        if tensor.dim() and 0 in tensor.shape:
            raise ValueError(
                f"inputs must have at least one row and one token, got shape {list(tensor.shape)}"
            )


def _add_gates(document: dict[str, Any], model: nn.Module) -> None:
    """Adds how gates decide that only Python knows."""
    gates = {name: layer.gate for name, layer in attention_layers(model).items()}
    for entry in document["inputs"]:
        for layer in entry["layers"]:
            gate = gates.get(layer["name"])
            if gate is not None and gate.how is not None:
                layer["gate"]["how"] = gate.how


def _add_plans(
    document: dict[str, Any], model: nn.Module, inputs: Any, forward_fn: ForwardFunction
) -> None:
    """Adds the plan of a bank that each input follows, and how clearly its router chose it."""
    layers = attention_layers(model)
    gates = {n: own.gate for n, own in layers.items() if isinstance(own.gate, BankGate)}
    for entry in document["inputs"]:
        entry["plan"] = None
    if not gates:
        return
    gate = next(iter(gates.values()))
    chosen = plan_choices(model, inputs, forward_fn=forward_fn)
    for entry, choice in zip(document["inputs"], chosen, strict=True):
        entry["plan"] = {
            "plan": choice.plan,
            "name": choice.name,
            "plans": list(gate.names),
            "scores": choice.scores,
            "next_plan": choice.next_plan,
            "margin": None if choice.next_plan is None else choice.margin,
            "decided_in": list(gates)[gate.at],
        }


def _add_roles(document: dict[str, Any], roles: Mapping[str, Any]) -> None:
    """Adds the roles that were found over a data set to the heads of each input."""
    if not isinstance(roles, Mapping):
        raise ValueError(f"roles must be a document, got {type(roles).__name__}")
    if roles.get("format") == "headwise.use":
        roles = roles["roles"]
    if roles.get("format") != "headwise.roles":
        raise ValueError(
            "roles must be a document of format 'headwise.roles', got "
            f"{quoted(roles.get('format'))}"
        )
    if "layers" not in roles:
        raise ValueError("roles must be a whole document: it lacks 'layers'")
    for entry in document["inputs"]:
        shapes = [(layer["name"], layer["call"], layer["num_heads"]) for layer in entry["layers"]]
        given = [(layer["name"], layer["call"], layer["num_heads"]) for layer in roles["layers"]]
        if shapes != given:
            raise ValueError("roles must be those of this model: its layers or heads differ")
        for layer, own in zip(entry["layers"], roles["layers"], strict=True):
            for head, found in zip(layer["heads"], own["heads"], strict=True):
                head["roles"] = found["roles"]


def _measure(
    core: _C.Explanation,
    model: nn.Module,
    sites: Sequence[str],
    inputs: Any,
    forward_fn: ForwardFunction,
    take: Take,
    batch_size: int,
    progress: bool | None,
) -> None:
    """Runs the model with each head of each input toggled."""
    total = core.num_inputs * core.num_heads
    with (
        holding(model, sites) as hold,
        progress_bar(total, "switching heads", "head", progress) as bar,
    ):
        for row in range(core.num_inputs):
            for begin in range(0, core.num_heads, batch_size):
                end = min(begin + batch_size, core.num_heads)
                hold(core.switched(row, begin, end))  # [end - begin, H] each
                rows = torch.full((end - begin,), row, dtype=torch.long)
                core.add_effects(row, begin, forward_fn(model, take(inputs, rows)).float())
                bar.update(end - begin)


def labels_of(model: nn.Module, classes: int) -> list[str]:
    """Names of the classes from the model's configuration; empty if it has none."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = [names.get(position) for position in range(classes)]
    return [] if any(label is None for label in labels) else [str(label) for label in labels]
