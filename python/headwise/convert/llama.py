"""Llama of transformers version 5, and the decoders whose attention is the same code under another
name: with a sliding window (Mistral, Mixtral, Qwen2), with norms of queries and keys (Qwen3), with
another scale (Granite), or as it stands (Arcee, Gemma, Jais2, Qwen2-MoE and others). EuroBERT is an
encoder of that code.

``LlamaAttention`` gives way to a :class:`headwise.GroupedQueryAttention` that is called as it was
and keeps the projections under their names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn

from headwise.convert.checks import (
    children_fault,
    first,
    forward_fault,
    projection_fault,
)
from headwise.convert.decoder import (
    IMPLEMENTATION,
    SelectedDecoderAttention,
    cache_word,
    decoder_outputs,
)
from headwise.convert.registry import Architecture, family, prefix_in
from headwise.convert.transformers_attention import (
    implementation_fault,
    in_the_mode_of,
    name_implementation,
    named,
)
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import carry_hooks
from headwise.nn.proof import Trial

#: What the classes of a model begin with -> the module that has them. tests/python/test_decoders.py
#: compares the attention of each with Llama's, statement by statement.
FAMILY = family(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTRIBUTES = ("head_dim", "scaling", "attention_dropout", "layer_idx", "is_causal", "config")


@functools.cache
def _selected(prefix: str) -> type[SelectedDecoderAttention]:
    # It is a LlamaAttention (MistralAttention, ...) so that transformers finds it when it collects
    # attention maps (output_attentions=True).
    original = named(f"{FAMILY[prefix]}.{prefix}Attention")
    name = f"Selected{prefix}Attention"
    return type(name, (SelectedDecoderAttention, original), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """``SelectedMistralAttention`` and the like, made when first asked for: pickles name them."""
    prefix = name.removeprefix("Selected").removesuffix("Attention")
    if name == f"Selected{prefix}Attention" and prefix in FAMILY:
        return _selected(prefix)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Llama(Architecture):
    name = "transformers Llama"

    def refusal(self, module: nn.Module) -> str | None:
        try:
            linears = {name: getattr(module, name) for name in _PROJECTIONS}
            [getattr(module, name) for name in _ATTRIBUTES]
        except AttributeError as error:
            return f"another version of transformers lays it out otherwise ({error})"
        return first(self._faults(module, linears))

    def _faults(self, module: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[str | None]:
        yield forward_fault("", module)
        yield children_fault("", module, (*_PROJECTIONS, "q_norm", "k_norm"))
        for name, linear in linears.items():
            yield projection_fault(name, linear)
        yield implementation_fault(module.config)
        if len({linears[name].bias is None for name in _PROJECTIONS[:3]}) > 1:
            yield "only some of its query, key and value projections have a bias"
        widths = {name: linears[name].out_features for name in _PROJECTIONS[:3]}
        heads, groups = (widths[n] // module.head_dim for n in ("q_proj", "k_proj"))
        if any(width % module.head_dim for width in widths.values()):
            yield f"its projections are not as wide as whole heads of {module.head_dim}"
        elif groups == 0 or heads % groups != 0:
            yield f"its {groups} key/value heads do not divide its {heads} query heads"

    def trial(self, module: nn.Module) -> Trial:
        return functools.partial(
            decoder_outputs,
            width=module.q_proj.in_features,
            rope=module.head_dim,
            cache_word=cache_word(module),
        )

    def convert(self, module: nn.Module) -> tuple[nn.Module, GroupedQueryAttention]:
        q_proj, k_proj, _, o_proj = (getattr(module, name) for name in _PROJECTIONS)
        sizes = {
            "embed_dim": o_proj.out_features,
            "num_heads": q_proj.out_features // module.head_dim,
            "num_key_value_heads": k_proj.out_features // module.head_dim,
            "head_dim": module.head_dim,
            "dropout": module.attention_dropout,
            "bias": q_proj.bias is not None,
            "output_bias": o_proj.bias is not None,
            "scale": module.scaling,
        }
        prefix = prefix_in(FAMILY, type(module), "Attention")
        successor = _selected(prefix)(module, sizes, device="meta")
        for name in _PROJECTIONS:
            setattr(successor, name, getattr(module, name))
        if getattr(module, "q_norm", None) is not None:
            successor.q_norm, successor.k_norm = module.q_norm, module.k_norm
        in_the_mode_of(module, successor)
        carry_hooks(module, successor)
        return successor, successor

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [module.config for module in converted], IMPLEMENTATION)


ARCHITECTURE = Llama()
