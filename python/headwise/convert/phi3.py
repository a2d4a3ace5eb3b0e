"""Phi-3 of transformers version 5: Llama's attention with one projection to queries, keys and
values. The converted layer has copies of its parameters.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.projections import Places
from headwise.convert.replacements import replacement_classes

PLACES = Places(packed="qkv_proj")


class Phi3Replacement(SelectedDecoderAttention):
    """Replaces ``Phi3Attention``."""

    places = PLACES


selected, __getattr__ = replacement_classes(__name__, Phi3Replacement)


class Phi3(TransformersProjected):
    name = "transformers Phi-3"
    replacement_class = staticmethod(selected)
    places = PLACES
    attributes = ("config", "is_causal", "layer_idx")

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        return {
            "num_heads": module.config.num_attention_heads,
            "num_key_value_heads": module.num_key_value_heads,
            "head_dim": module.head_dim,
            "dropout": module.attention_dropout,
            "scale": module.scaling,
        }

    def rotates(self, module: nn.Module) -> bool:
        return True


ARCHITECTURE = Phi3()
