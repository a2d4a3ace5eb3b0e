"""Llama of transformers version 5, and the decoders whose attention is the same code under another
name: with a sliding window (Mistral, Mixtral, Qwen2), with norms of queries and keys (Qwen3,
Gemma 3), with another scale (Granite), with layers that do not rotate (SmolLM3), or unchanged
(Arcee, Gemma, Jais2, Qwen2-MoE and others). EuroBERT is an encoder of that code.

``LlamaAttention`` is replaced by a :class:`headwise.GroupedQueryAttention` with the same call and
the same names of projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.registry import family
from headwise.convert.replacements import replacement_classes

#: Prefix of a model's classes -> their module. tests/python/test_decoders.py compares the attention
#: of each with Llama's, statement by statement.
FAMILY = family(__name__)

selected, __getattr__ = replacement_classes(__name__, SelectedDecoderAttention)


class Llama(TransformersProjected):
    name = "transformers Llama"
    replacement_class = staticmethod(selected)
    children: tuple[str, ...] = ("q_norm", "k_norm")
    attributes: tuple[str, ...] = ("config", "is_causal", "layer_idx")

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        return {
            "num_heads": module.q_proj.out_features // module.head_dim,
            "num_key_value_heads": module.k_proj.out_features // module.head_dim,
            "head_dim": module.head_dim,
            "dropout": module.attention_dropout,
            "scale": module.scaling,
        }

    def rotates(self, module: nn.Module) -> bool:
        return True

    def caches(self, module: nn.Module) -> bool:
        return True

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> SelectedDecoderAttention:
        replacement = super().replacement(module, sizes)
        replacement.rotates = bool(getattr(module, "use_rope", True))  # SmolLM3: not in all layers
        if getattr(module, "q_norm", None) is not None:
            replacement.q_norm, replacement.k_norm = module.q_norm, module.k_norm
        return replacement


ARCHITECTURE = Llama()
