"""Wav2Vec2 of transformers version 5, and the speech encoders whose attention is the same code
under another name: HuBERT, SEW, UniSpeech, UniSpeech-SAT, data2vec's audio model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.bart import PLACES
from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.older_versions import outputs
from headwise.convert.registry import family
from headwise.convert.replacements import replacement_classes

#: Prefix of a model's classes -> their module.
FAMILY = family(__name__)


class SelectedSpeechAttention(SelectedDecoderAttention):
    """Replaces ``Wav2Vec2Attention``."""

    places = PLACES
    rotates = False

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor | None, ...]:
        """As :meth:`SelectedDecoderAttention.attend`; there is no other sequence. In older versions
        of transformers there is a third output, None."""
        options["output_attentions"] = output_attentions or None
        if key_value_states is not None:
            raise ValueError("key_value_states must be None: a converted model is an encoder")
        more = [None] * (outputs(type(self).__bases__[-1]) - 2)
        return (*self.attend(hidden_states, attention_mask, None, options), *more)


selected, __getattr__ = replacement_classes(__name__, SelectedSpeechAttention)


class Wav2Vec2(TransformersProjected):
    name = "transformers Wav2Vec2"
    replacement_class = staticmethod(selected)
    places = PLACES
    attributes = ("config", "is_causal", "is_decoder")

    def refusal(self, module: nn.Module) -> str | None:
        if module.is_decoder:
            return "it belongs to a decoder"
        return super().refusal(module)


ARCHITECTURE = Wav2Vec2()
