"""Removing what a structure plan drops from the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise import _C
from headwise.convert.registry import class_path
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import carry_hooks, replace_module
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.pruning.plans import LayerPlan
from headwise.pruning.structured.description import FeedForward, Stream, Structure, join, structure
from headwise.pruning.structured.masks import norms_after
from headwise.pruning.structured.narrow import (
    NarrowTransformerEncoder,
    SelectingLayerNorm,
    SkippedLayerNorm,
    Widening,
    WideningLayerNorm,
)
from headwise.pruning.structured.plan import FfnPlan, HiddenPlan, StructurePlan

#: Linear layers that are the only readers of the last hidden state of these models; every other
#: model's output keeps its width.
_BERT = "transformers.models.bert.modeling_bert."
READERS = {
    f"{_BERT}BertForSequenceClassification": "bert.pooler.dense",
    f"{_BERT}BertForMultipleChoice": "bert.pooler.dense",
    f"{_BERT}BertForNextSentencePrediction": "bert.pooler.dense",
    f"{_BERT}BertForTokenClassification": "classifier",
    f"{_BERT}BertForQuestionAnswering": "qa_outputs",
}


def set_parameters(module: nn.Module, values: Mapping[str, Tensor], old: nn.Module) -> None:
    """Gives ``module`` new parameters, trained or frozen like those of ``old``; those missing in
    ``values`` become None."""
    for name, parameter in list(old.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if name in values:
            value = nn.Parameter(values[name].contiguous(), requires_grad=parameter.requires_grad)
            setattr(owner, leaf, value)
        else:
            setattr(owner, leaf, None)


def resized_linear(old: nn.Linear, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer of these sizes, zero included, with the hooks of ``old``.

    Its values are NaN, so that a value that is never set is noticed.
    """
    new = nn.Linear(1, 1, bias=False, device="meta")
    new.in_features, new.out_features = in_features, out_features
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    new.weight = nn.Parameter(
        torch.full((out_features, in_features), math.nan, **like), old.weight.requires_grad
    )
    if bias:
        trained = old.weight.requires_grad if old.bias is None else old.bias.requires_grad
        new.bias = nn.Parameter(torch.full((out_features,), math.nan, **like), trained)
    carry_hooks(old, new)
    return new.train(old.training)


def resized_attention(
    old: MultiheadAttention, num_heads: int, embed_dim: int, removed: bool = False
) -> MultiheadAttention:
    """A layer of these sizes whose parameters have no values yet (device "meta").

    ``removed``: a placeholder for a removed block, without heads and biases: it adds 0.
    """
    sizes = {**old.describe(), "num_heads": num_heads, "embed_dim": embed_dim}
    if old._same_embed_dim:
        sizes |= {"kdim": embed_dim, "vdim": embed_dim}
    if removed:
        sizes |= {"bias": False, "add_bias_kv": False}
    new = MultiheadAttention(**sizes, device="meta")
    carry_hooks(old, new)
    return new.train(old.training)


def check_plan(found: Structure, plan: StructurePlan) -> None:
    """Raises ValueError: the plan names parts that do not exist, or is for other sizes."""
    kinds = [
        ("layer", "heads", found.heads, {p.name: p.num_heads for p in plan.heads.layers}),
        ("network", "neurons", found.neurons, {p.name: p.num_neurons for p in plan.ffn}),
    ]
    for kind, unit, has, planned in kinds:
        for name, count in planned.items():
            if name not in has:
                raise ValueError(
                    f"plan names {kind} '{name}', which model does not have; "
                    f"it has {', '.join(map(repr, has)) or 'none'}"
                )
            if count != has[name]:
                raise ValueError(
                    f"plan has {count} {unit} for {kind} '{name}', which has {has[name]} in model"
                )
    for block in plan.blocks:
        if block.name not in found.attention and block.name not in found.ffn:
            raise ValueError(
                f"plan names block '{block.name}', which model does not have; it has "
                f"{', '.join(map(repr, (*found.attention, *found.ffn)))}"
            )
    if plan.hidden is not None:
        if found.stream is None:
            raise ValueError(f"hidden dimensions of model cannot be pruned: {found.no_stream}")
        if plan.hidden.size != found.stream.size:
            raise ValueError(
                f"plan has {plan.hidden.size} hidden dimensions, model has {found.stream.size}"
            )


def compact(model: nn.Module, plan: StructurePlan) -> nn.Module:
    """Removes in place what ``plan`` drops; returns the model or its replacement.

    ``plan`` fits ``model`` (:func:`check_plan`), and no layer has a gate that chooses.
    """
    found = structure(model)
    blocks = {block.name: block.scale for block in plan.blocks}
    heads = {entry.name: entry for entry in plan.heads.layers}
    for name, layer in found.attention.items():
        if name in heads or name in blocks:
            entry = heads.get(name) or _all_heads(name, layer.num_heads)
            model = _compact_attention(model, layer, entry, blocks.get(name, 1.0))
    neurons = {entry.name: entry for entry in plan.ffn}
    for name, ffn in found.ffn.items():
        if name in neurons or name in blocks:
            every = list(range(ffn.num_neurons))
            own = neurons.get(name) or FfnPlan(name, ffn.num_neurons, every)
            _compact_ffn(model, ffn, own, blocks.get(name, 1.0))
    after = norms_after(model, found)
    skip_norms(
        model, [after[name] for name, scale in blocks.items() if scale == 0 and name in after]
    )
    if plan.hidden is not None:
        model = _compact_hidden(model, plan.hidden)
    return leave_fast_paths(model)


def skip_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces layer norms, those after removed blocks, by :class:`SkippedLayerNorm`, in place."""
    for name in names:
        norm: Any = model.get_submodule(name)
        replace_module(model, norm, SkippedLayerNorm(norm))


def _all_heads(name: str, num_heads: int) -> LayerPlan:
    return LayerPlan(name, num_heads, list(range(num_heads)))


def _compact_attention(
    model: nn.Module, layer: AttentionLayer, entry: LayerPlan, scale: float
) -> nn.Module:
    layer.set_gate(None)
    if isinstance(layer, GroupedQueryAttention):
        return replace_module(model, layer, _compact_grouped(layer, entry, scale))
    assert isinstance(layer, MultiheadAttention)
    kept = _C.prune_attention(dict(layer.named_parameters()), entry, scale)
    removed = scale == 0.0
    new = resized_attention(layer, 0 if removed else len(entry.heads), layer.embed_dim, removed)
    set_parameters(new, kept, layer)
    return replace_module(model, layer, new)


def _compact_grouped(
    layer: GroupedQueryAttention, entry: LayerPlan, scale: float
) -> GroupedQueryAttention:
    """As :func:`_compact_attention`, for heads that share keys and values."""
    new = layer.pruned(entry if scale != 0.0 else LayerPlan(entry.name, entry.num_heads, []))
    carry_hooks(layer, new)
    if scale == 0.0:
        new.o_proj.register_parameter("bias", None)
    with torch.no_grad():
        for parameter in new.o_proj.parameters():
            parameter.mul_(scale)
    return new


def _compact_ffn(model: nn.Module, ffn: FeedForward, entry: FfnPlan, scale: float) -> None:
    first, second = ffn.first, ffn.second
    parameters = {
        f"{name}.{key}": parameter
        for name, linear in (("linear1", first), ("linear2", second))
        for key, parameter in linear.named_parameters()
    }
    kept = _C.prune_ffn(parameters, entry, scale)
    neurons = kept["linear1.weight"].size(0)
    for name, old, sizes in (
        ("linear1", first, (first.in_features, neurons)),
        ("linear2", second, (neurons, second.out_features)),
    ):
        new = resized_linear(old, *sizes, bias=False)
        values = {
            key: kept[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in kept
        }
        set_parameters(new, values, old)
        replace_module(model, old, new)


def leave_fast_paths(model: nn.Module) -> nn.Module:
    """Makes torch's encoders run the layers that their fused kernel cannot."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(not _is_whole(layer) for layer in module.layers):
                module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and not _is_whole(module):
            module.activation_relu_or_gelu = 0
    return model


def _is_whole(layer: nn.Module) -> bool:
    """Whether a torch encoder layer has both its blocks and its full width."""
    attention = getattr(layer, "self_attn", None)
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.in_proj_bias is not None
        and layer.linear2.bias is not None
        and layer.linear1.out_features > 0
        and attention.num_heads * attention.head_dim == attention.embed_dim
    )


# --- hidden dimensions ---


def _compact_hidden(model: nn.Module, plan: HiddenPlan) -> nn.Module:
    found = structure(model)
    stream = found.stream
    assert stream is not None

    def kept(parameter: Tensor, dim: int, scaled: bool = False) -> Tensor:
        return _C.prune_hidden(parameter.detach(), dim, plan, scaled)

    values = {}  # new parameters, by name, of what only changes its sizes
    for layer in stream.layers:
        for key, parameter in found.attention[layer.attention].named_parameters():
            name = join(layer.attention, key)
            if key in ("out_proj.weight", "out_proj.bias"):  # the output to the stream is scaled
                values[name] = kept(parameter, 0, True)
            elif key == "in_proj_weight":
                values[name] = kept(parameter, 1)
            else:
                values[name] = parameter.detach().clone()
        ffn = found.ffn[layer.ffn]
        for key, parameter in ffn.first.named_parameters():
            value = parameter.detach().clone() if key == "bias" else kept(parameter, 1)
            values[join(ffn.name, key)] = value
        for key, parameter in ffn.second.named_parameters():
            values[join(ffn.second_name, key)] = kept(parameter, 0, True)
    for name in (*stream.extra_norms, *(n for layer in stream.layers for n in layer.norms)):
        for key, parameter in model.get_submodule(name).named_parameters():
            values[join(name, key)] = kept(parameter, 0, not stream.norm_first)
    entries = join(stream.entry, "embeddings")
    values |= {
        name: kept(model.get_parameter(name), dim, name.startswith(entries))
        for name, dim in stream_edges(model, stream)
    }
    trained = {name: model.get_parameter(name).requires_grad for name in values}
    model = narrow(model, stream, len(plan.dimensions))
    with torch.no_grad():
        for name, value in values.items():
            parameter = model.get_parameter(name)
            parameter.data = value.contiguous()
            parameter.requires_grad_(trained[name])
        for module in model.modules():
            if "dimensions" in module._buffers:
                module.dimensions.copy_(torch.tensor(plan.dimensions))
            if isinstance(module, (NarrowTransformerEncoder, SelectingLayerNorm)):
                module.scale.copy_(torch.tensor(plan.scale, dtype=torch.float64))
    return model


def stream_edges(model: nn.Module, stream: Stream) -> list[tuple[str, int]]:
    """Parameters outside the layers that become narrower, with the dimension."""
    if stream.kind == "encoder":
        return []
    edges = []
    embeddings = join(stream.entry, "embeddings")
    if not _embeddings_are_tied(model, embeddings):
        edges += [
            (f"{embeddings}.{table}_embeddings.weight", 1)
            for table in ("word", "position", "token_type")
        ]
    if class_path(type(model)) in READERS:
        edges.append((f"{READERS[class_path(type(model))]}.weight", 1))
    return edges


def _embeddings_are_tied(model: nn.Module, embeddings: str) -> bool:
    tables = model.get_submodule(embeddings)
    weights = {
        id(t.weight)
        for t in (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings)
    }
    owners = sum(
        id(parameter) in weights
        for module in model.modules()
        for parameter in module._parameters.values()
    )
    return owners > 3


def narrow(model: nn.Module, stream: Stream, kept: int) -> nn.Module:
    """Gives every module of the stream the sizes it has with ``kept`` dimensions, in place.

    Parameters get new shapes; their values, and the dimensions in the modules of
    :mod:`headwise.pruning.structured.narrow`, must be set by the caller.
    """
    found = structure(model)
    edges = stream_edges(model, stream)
    ends = _narrow_ends(model, stream, kept)
    for layer in stream.layers:
        old: Any = found.attention[layer.attention]
        new: Any = resized_attention(old, old.num_heads, kept).to(old.out_proj.weight.dtype)
        new = new.to_empty(device=old.out_proj.weight.device)
        for parameter in new.parameters():
            parameter.data.fill_(math.nan)
        replace_module(model, old, new)
        ffn = found.ffn[layer.ffn]
        first, second = ffn.first, ffn.second
        replace_module(
            model, first, resized_linear(first, kept, first.out_features, first.bias is not None)
        )
        replace_module(
            model, second, resized_linear(second, second.in_features, kept, second.bias is not None)
        )
    for name in (*stream.extra_norms, *(n for layer in stream.layers for n in layer.norms)):
        old = model.get_submodule(name)
        if name in ends:
            new = ends[name]
        elif isinstance(old, SkippedLayerNorm):
            continue
        else:
            like = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = nn.LayerNorm(kept, old.eps, bias=old.bias is not None, **like)
            carry_hooks(old, new)
            new.train(old.training)
        replace_module(model, old, new)
    for name, dim in edges:
        owner = model.get_submodule(name.rpartition(".")[0])
        shape = list(owner.weight.shape)
        shape[dim] = kept
        owner.weight = nn.Parameter(owner.weight.new_empty(shape), owner.weight.requires_grad)
        setattr(owner, "embedding_dim" if isinstance(owner, nn.Embedding) else "in_features", kept)
    if stream.kind == "encoder":
        encoder: Any = model.get_submodule(stream.entry)
        model = replace_module(model, encoder, NarrowTransformerEncoder(encoder, kept, stream.size))
    return model


def _narrow_ends(model: nn.Module, stream: Stream, kept: int) -> dict[str, nn.Module]:
    """The norms that also change the width."""
    if stream.kind == "encoder":
        return {}
    ends: dict[str, nn.Module] = {}
    embeddings = join(stream.entry, "embeddings")
    norm: Any
    if _embeddings_are_tied(model, embeddings):
        name = f"{embeddings}.LayerNorm"
        norm = model.get_submodule(name)
        ends[name] = SelectingLayerNorm(norm, kept, stream.size)
    if class_path(type(model)) not in READERS:
        name = stream.layers[-1].norms[1]
        norm = model.get_submodule(name)
        if isinstance(norm, SkippedLayerNorm):
            device = next(model.parameters()).device
            ends[name] = Widening(norm, kept, stream.size, device)
        else:
            ends[name] = WideningLayerNorm(norm, kept, stream.size)
    return ends
