"""CLIP and SigLIP of transformers version 5, both towers, and the models whose attention is the
same code under another name: encoders with query, key, value and output in four linear layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.bart import PLACES
from headwise.convert.decoder import SelectedDecoderAttention, TransformersProjected
from headwise.convert.registry import family
from headwise.convert.replacements import replacement_classes

#: Prefix of a model's classes -> their module.
FAMILY = family(__name__)


class SelectedEncoderAttention(SelectedDecoderAttention):
    """Replaces ``CLIPAttention``."""

    places = PLACES
    rotates = False

    def forward(  # type: ignore[override]  # as transformers calls it
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.attend`; causal in the text tower of CLIP."""
        return self.attend(hidden_states, attention_mask, None, options)


selected, __getattr__ = replacement_classes(__name__, SelectedEncoderAttention)


class Clip(TransformersProjected):
    name = "transformers CLIP"
    replacement_class = staticmethod(selected)
    places = PLACES

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        return {
            "num_heads": module.num_heads,
            "num_key_value_heads": module.num_heads,
            "head_dim": module.head_dim,
            "dropout": module.dropout,
            "scale": module.scale,
        }


ARCHITECTURE = Clip()
