"""BART of transformers version 5, and the models whose attention is the same code under another
name (mBART, Marian, Pegasus, M2M100, Blenderbot, PLBart), or the same without a bias of the keys
(Whisper): self-attention of the encoder, masked self-attention of the decoder and cross-attention,
as separate layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.convert.arguments import one_cache
from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.projections import Places
from headwise.convert.registry import family
from headwise.convert.replacements import replacement_classes

#: Prefix of a model's classes -> their module.
FAMILY = family(__name__)

PLACES = Places(output="out_proj")


class BartReplacement(SelectedDecoderAttention):
    """Replaces ``BartAttention``."""

    places = PLACES
    rotates = False

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.attend`: over ``key_value_states [B, S, D]``, if there
        are any."""
        past = one_cache(self, cache, past_key_values)
        return self.attend(hidden_states, attention_mask, past, options, memory=key_value_states)


selected, __getattr__ = replacement_classes(__name__, BartReplacement)


class Bart(TransformersProjected):
    name = "transformers BART"
    replacement_class = staticmethod(selected)
    places = PLACES
    attributes = ("config", "is_causal", "is_decoder", "layer_idx")


ARCHITECTURE = Bart()
