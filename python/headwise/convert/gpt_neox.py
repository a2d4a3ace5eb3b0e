"""GPT-NeoX of transformers version 5 (Pythia): one projection whose rows are queries, keys and
values of each head in turn, and a rotary embedding of a part of each head.

The converted layer has copies of the projection's parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.arguments import one_cache
from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.projections import Places
from headwise.convert.replacements import replacement_classes

PLACES = Places(output="dense", packed="query_key_value", per_head=True)


class GPTNeoXReplacement(SelectedDecoderAttention):
    """Replaces ``GPTNeoXAttention``."""

    places = PLACES

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.forward`, with GPT-NeoX's names of arguments."""
        past = one_cache(self, layer_past, options.pop("cache", None))
        return super().forward(hidden_states, position_embeddings, attention_mask, past, **options)


selected, __getattr__ = replacement_classes(__name__, GPTNeoXReplacement)


class GPTNeoX(TransformersProjected):
    name = "transformers GPT-NeoX"
    replacement_class = staticmethod(selected)
    places = PLACES
    attributes = ("config", "is_causal", "layer_idx")

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        heads = module.config.num_attention_heads
        return {
            "num_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": module.head_size,
            "dropout": module.attention_dropout,
            "scale": module.scaling,
        }

    def rotates(self, module: nn.Module) -> bool:
        return True


ARCHITECTURE = GPTNeoX()
