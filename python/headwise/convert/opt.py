"""OPT of transformers version 5: BART's attention in a decoder only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.convert.arguments import one_cache
from headwise.convert.bart import PLACES
from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.replacements import replacement_classes


class SelectedCausalAttention(SelectedDecoderAttention):
    """Replaces ``OPTAttention``."""

    places = PLACES
    rotates = False

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.attend`."""
        past = one_cache(self, cache, past_key_values)
        return self.attend(hidden_states, attention_mask, past, options)


selected, __getattr__ = replacement_classes(__name__, SelectedCausalAttention)


class Opt(TransformersProjected):
    name = "transformers OPT"
    replacement_class = staticmethod(selected)
    places = PLACES
    attributes = ("config", "is_causal", "layer_idx")


ARCHITECTURE = Opt()
