"""Llama of transformers version 5, and the decoders whose attention is the same code under another
name: with a sliding window (Mistral, Mixtral, Qwen2), with norms of queries and keys (Qwen3), with
another scale (Granite), or as it stands (Arcee, Gemma, Jais2, Qwen2-MoE and others). EuroBERT is an
encoder of that code.

``LlamaAttention`` gives way to a module around one :class:`headwise.GroupedQueryAttention`, which
keeps the parameters.
"""

from __future__ import annotations

import functools

from torch import nn

from headwise.convert.decoder import IMPLEMENTATION, SelectedDecoderAttention
from headwise.convert.registry import Architecture, family
from headwise.convert.torch_attention import carry_hooks, replaced_text
from headwise.convert.transformers_attention import name_implementation, named
from headwise.nn.grouped_query_attention import GroupedQueryAttention

#: What the classes of a model begin with -> the module that has them.
#: tests/python/nn/test_decoders.py compares the attention of each with Llama's,
#: statement by statement.
FAMILY = family(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


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
            width = module.head_dim
            [getattr(module, name) for name in ("scaling", "attention_dropout", "layer_idx")]
        except AttributeError as error:
            return f"another version of transformers lays it out otherwise ({error})"
        for name, linear in linears.items():
            if type(linear) is not nn.Linear:
                return replaced_text(name, linear)
        if len({linears[name].bias is None for name in _PROJECTIONS[:3]}) > 1:
            return "only some of its query, key and value projections have a bias"
        heads, groups = (linears[n].out_features // width for n in ("q_proj", "k_proj"))
        if heads % groups != 0:
            return f"its {groups} key/value heads do not divide its {heads} query heads"
        return None

    def convert(self, module: nn.Module) -> tuple[nn.Module, GroupedQueryAttention]:
        q_proj, k_proj, _, o_proj = (getattr(module, name) for name in _PROJECTIONS)
        q_norm = getattr(module, "q_norm", None)
        gqa = GroupedQueryAttention(
            o_proj.out_features,
            q_proj.out_features // module.head_dim,
            k_proj.out_features // module.head_dim,
            module.head_dim,
            dropout=module.attention_dropout,
            bias=q_proj.bias is not None,
            output_bias=o_proj.bias is not None,
            scale=module.scaling,
            device="meta",
        )
        for name in _PROJECTIONS:
            setattr(gqa, name, getattr(module, name))
        if q_norm is not None:
            gqa.q_norm, gqa.k_norm = q_norm, module.k_norm
        prefix = type(module).__name__.removesuffix("Attention")
        successor = _selected(prefix)(module, gqa)
        successor.train(module.training)
        carry_hooks(module, successor)
        return successor, gqa

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [module.config for module in converted], IMPLEMENTATION)


ARCHITECTURE = Llama()
