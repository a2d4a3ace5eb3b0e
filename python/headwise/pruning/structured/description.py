"""The parts of a model that can be pruned: heads, neurons, blocks and hidden dimensions, by
name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from headwise import _C
from headwise.convert.registry import class_path, family
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.layers import attention_layers
from headwise.pruning.structured.narrow import NARROW, SkippedLayerNorm

__all__ = ["FeedForward", "Structure", "TransformerLayer", "structure"]


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: ``second(activation(first(x)))``. Its name is that of ``first``."""

    name: str
    first: nn.Linear
    second: nn.Linear
    second_name: str

    @property
    def num_neurons(self) -> int:
        return self.first.out_features


@dataclass(frozen=True)
class TransformerLayer:
    """A layer of a residual stream: self-attention, then a feed-forward network.

    Attributes:
        attention: name of its attention layer.
        ffn: name of its feed-forward network.
        norms: names of its layer norms, that of attention first.
        norm_first: whether a block's norm is on its input, or on the sum after it.
    """

    name: str
    module: nn.Module
    attention: str
    ffn: str
    norms: tuple[str, str]
    norm_first: bool


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model: its writers and readers.

    Attributes:
        size: its width, D.
        layers: in the order in which they run.
        entry: name of what holds the layers (``torch.nn.TransformerEncoder``), or of the
            embeddings.
        extra_norms: names of the stream's norms that belong to no layer.
    """

    kind: str
    size: int
    layers: tuple[TransformerLayer, ...]
    entry: str
    extra_norms: tuple[str, ...]

    @property
    def norm_first(self) -> bool:
        return self.layers[0].norm_first


@dataclass(frozen=True)
class Structure:
    """The parts of a model that can be pruned.

    Attributes:
        attention: its attention layers, by name.
        ffn: its feed-forward networks, by name.
        layers: its transformer layers, in the order in which they run.
        stream: its residual stream, if it has exactly one of a known kind.
        no_stream: otherwise why hidden dimensions cannot be pruned.
    """

    attention: dict[str, AttentionLayer]
    ffn: dict[str, FeedForward]
    layers: tuple[TransformerLayer, ...] = ()
    stream: Stream | None = None
    no_stream: str = ""

    @property
    def heads(self) -> dict[str, int]:
        """Heads of each attention layer."""
        return {name: layer.num_heads for name, layer in self.attention.items()}

    @property
    def neurons(self) -> dict[str, int]:
        """Neurons of each feed-forward network."""
        return {name: ffn.num_neurons for name, ffn in self.ffn.items()}

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream, if its dimensions can be pruned."""
        return None if self.stream is None else self.stream.size

    def macs(self, tokens: float) -> float:
        """Multiply-accumulates of all heads and neurons for one sequence of ``tokens``."""
        heads = sum(
            layer.num_heads * _C.head_macs(tokens, layer.embed_dim, layer.head_dim)
            - 2 * _shared(layer) * tokens  # keys and values that query heads share
            for layer in self.attention.values()
        )
        neurons = sum(
            ffn.num_neurons * _C.neuron_macs(tokens, ffn.first.in_features)
            for ffn in self.ffn.values()
        )
        return heads + neurons

    @property
    def size(self) -> int:
        """Weights of all heads and neurons, without biases: the model's size in CoFi's sense."""
        heads = sum(
            4 * layer.num_heads * layer.head_dim * layer.embed_dim - 2 * _shared(layer)
            for layer in self.attention.values()
        )
        return heads + sum(2 * f.num_neurons * f.first.in_features for f in self.ffn.values())

    def __str__(self) -> str:
        hidden = f"none ({self.no_stream})" if self.stream is None else str(self.stream.size)
        return (
            f"{len(self.attention)} attention layers ({sum(self.heads.values())} heads), "
            f"{len(self.ffn)} feed-forward networks ({sum(self.neurons.values())} neurons), "
            f"hidden dimensions: {hidden}"
        )


def _shared(layer: AttentionLayer) -> int:
    """How many weights fewer a shared key projection has than one for every query head."""
    return (layer.num_heads - len(set(layer.head_groups))) * layer.head_dim * layer.embed_dim


def join(*parts: str) -> str:
    """The qualified name of a module's part; the model's own name is empty."""
    return ".".join(part for part in parts if part)


@dataclass(frozen=True)
class _LayerNames:
    """The names of a transformer layer class's parts."""

    attention: str | None
    first: str
    second: str
    norms: tuple[str, str] | None
    norm_first: Callable[[nn.Module], bool] = lambda module: False


_BERT = family("headwise.convert.bert")  # prefix of the classes -> their module
_VIT = family("headwise.convert.vit")
_BERT_LAYER = _LayerNames(
    "attention.self.mha",
    "intermediate.dense",
    "output.dense",
    ("attention.output.LayerNorm", "output.LayerNorm"),
)
_LAYERS = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": _LayerNames(
        "self_attn", "linear1", "linear2", ("norm1", "norm2"), lambda module: module.norm_first
    ),
    # It attends to another stream, so it is not a layer of one stream; its neurons can be pruned.
    "torch.nn.modules.transformer.TransformerDecoderLayer": _LayerNames(
        None, "linear1", "linear2", None
    ),
    **{f"{module}.{prefix}Layer": _BERT_LAYER for prefix, module in _BERT.items()},
    "transformers.models.distilbert.modeling_distilbert.TransformerBlock": _LayerNames(
        "attention.mha", "ffn.lin1", "ffn.lin2", ("sa_layer_norm", "output_layer_norm")
    ),
    # Their norms and scales differ; their neurons can be pruned.
    **{
        f"{module}.{prefix}Layer": _LayerNames(None, "mlp.fc1", "mlp.fc2", None)
        for prefix, module in _VIT.items()
    },
}
_BERT_MODELS = {f"{module}.{prefix}Model" for prefix, module in _BERT.items()}


def structure(model: nn.Module) -> Structure:
    """Finds the parts of ``model`` that can be pruned.

    Heads and attention blocks: of every :class:`headwise.MultiheadAttention`. Neurons and
    feed-forward blocks: of ``torch.nn.TransformerEncoderLayer`` and ``TransformerDecoderLayer``,
    and of the encoders of transformers that :func:`headwise.convert` knows, if they have two linear
    layers. Hidden dimensions: if the model has exactly one residual stream, a
    ``torch.nn.TransformerEncoder`` or a ``BertModel``, ``RobertaModel`` or similar.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no converted attention (call :func:`headwise.convert` first).
    """
    attention = attention_layers(model)
    if not attention:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention: "
            f"call headwise.convert first"
        )
    ffn: dict[str, FeedForward] = {}
    layers: list[TransformerLayer] = []
    for name, module in model.named_modules():
        names = _LAYERS.get(class_path(type(module)))
        if names is None:
            continue
        try:
            first, second = (module.get_submodule(part) for part in (names.first, names.second))
        except AttributeError:
            continue  # another kind of feed-forward network, such as SwiGLU
        if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
            continue  # they were replaced
        found = FeedForward(join(name, names.first), first, second, join(name, names.second))
        ffn[found.name] = found
        if (
            names.attention is None
            or names.norms is None
            or join(name, names.attention) not in attention
        ):
            continue
        layers.append(
            TransformerLayer(
                name,
                module,
                join(name, names.attention),
                found.name,
                (join(name, names.norms[0]), join(name, names.norms[1])),
                names.norm_first(module),
            )
        )
    stream, why = _stream(model, attention, layers)
    return Structure(attention, ffn, tuple(layers), stream, why)


def _stream(
    model: nn.Module, attention: dict[str, AttentionLayer], layers: list[TransformerLayer]
) -> tuple[Stream | None, str]:
    """The model's residual stream, or why its dimensions cannot be pruned."""
    if any(isinstance(module, NARROW) for module in model.modules()):
        return None, "they were pruned before"
    outside = set(attention) - {layer.attention for layer in layers}
    if outside:
        return None, f"'{min(outside)}' is not in a layer whose residual stream is known"
    if len({layer.norm_first for layer in layers}) > 1:
        return None, "layers differ in norm_first"
    for kind, find in (("encoder", _encoder_streams), ("bert", _bert_streams)):
        streams = find(model, layers)
        if len(streams) > 1:
            return None, f"the model has {len(streams)} residual streams"
        if streams and len(streams[0][1]) == len(layers):
            entry, own, extra = streams[0]
            size = attention[own[0].attention].embed_dim
            return Stream(kind, size, tuple(own), entry, extra), ""
    return None, "the layers are in neither one torch.nn.TransformerEncoder nor one BertModel"


_Found = list[tuple[str, list[TransformerLayer], tuple[str, ...]]]


def _encoder_streams(model: nn.Module, layers: list[TransformerLayer]) -> _Found:
    found: _Found = []
    for name, module in model.named_modules():
        if type(module) is not nn.TransformerEncoder:
            continue
        own = [layer for layer in layers if any(layer.module is m for m in module.layers)]
        plain = module.norm is None or isinstance(module.norm, nn.LayerNorm)
        if own and len(own) == len(module.layers) and plain:
            found.append((name, own, () if module.norm is None else (join(name, "norm"),)))
    return found


def _bert_streams(model: nn.Module, layers: list[TransformerLayer]) -> _Found:
    found: _Found = []
    for name, module in model.named_modules():
        if class_path(type(module)) not in _BERT_MODELS:
            continue
        # ELECTRA may widen its embeddings after their norm, RoCBert narrows them before.
        if hasattr(module, "embeddings_project") or hasattr(module.embeddings, "map_inputs_layer"):
            continue
        own = [layer for layer in layers if any(layer.module is m for m in module.encoder.layer)]
        norms = [module.embeddings.LayerNorm]
        norms += [layer.module.get_submodule("output.LayerNorm") for layer in own]
        if (
            own
            and len(own) == len(module.encoder.layer)
            and all(isinstance(norm, (nn.LayerNorm, SkippedLayerNorm)) for norm in norms)
        ):
            found.append((name, own, (join(name, "embeddings.LayerNorm"),)))
    return found
