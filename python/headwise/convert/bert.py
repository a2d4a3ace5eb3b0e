"""BERT of transformers version 5, and the encoders whose attention is the same code under another
name: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE, data2vec's text model, RoCBert.

``BertAttention.self`` (query, key, value) and ``BertAttention.output.dense`` become one
:class:`headwise.MultiheadAttention`; the rest of ``output`` (dropout, residual, layer norm) stays.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.arguments import one_cache
from headwise.convert.checks import class_fault
from headwise.convert.inner_attention import InnerAttention
from headwise.convert.registry import family, prefix_in
from headwise.convert.replacements import named, replacement_classes
from headwise.convert.transformers_attention import EncoderReplacement
from headwise.nn.multihead_attention import MultiheadAttention

#: Prefix of a model's classes -> their module. tests/python/test_convert.py compares the attention
#: of each with BERT's, statement by statement.
FAMILY = family(__name__)


class SelectedSelfAttention(EncoderReplacement):
    """Replaces ``BertSelfAttention``; its output is already projected."""

    PROJECTIONS = ("self.query", "self.key", "self.value", "output.dense")

    def __init__(self, original: nn.Module, mha: MultiheadAttention):
        super().__init__(original, mha)
        self.is_decoder = original.is_decoder
        self.layer_idx = original.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Like :meth:`EncoderReplacement.forward`; there is no cache."""
        if one_cache(self, cache, past_key_values) is not None:
            raise ValueError("cache must be None: a converted model is an encoder")
        return super().forward(hidden_states, attention_mask, **options)

    def _place(self, name: str) -> str:
        return name.removesuffix("self")


selected, __getattr__ = replacement_classes(__name__, SelectedSelfAttention, "SelfAttention")


class Bert(InnerAttention):
    name = "transformers BERT (encoder)"
    inner = "self"
    children = {
        "": ("self", "output"),
        "self": ("query", "key", "value", "dropout"),
        "output": ("dense", "LayerNorm", "dropout"),
    }

    def refusal(self, module: nn.Module) -> str | None:
        prefix = prefix_in(FAMILY, type(module), "Attention")
        expected = named(f"{FAMILY[prefix]}.{prefix}SelfAttention")
        fault = class_fault("self-attention", module.self, expected)
        if fault is not None:
            return fault
        if module.self.is_decoder:
            return "it belongs to a decoder (config.is_decoder), which caches keys and values"
        return super().refusal(module)

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        own = module.self
        return own.num_attention_heads, own.attention_head_size, own.dropout.p

    def replacement(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        return selected(type(old))(old, mha)


ARCHITECTURE = Bert()
