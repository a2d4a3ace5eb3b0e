"""Decoders with Llama's attention and a rotary embedding of neighbours, feature 2i with feature
2i + 1: GLM and GLM-4 of transformers version 5. They rotate by their own function.
"""

from __future__ import annotations

import sys

from torch import Tensor

from headwise.convert.decoder import SelectedDecoderAttention
from headwise.convert.llama import Llama
from headwise.convert.replacements import replacement_classes


class SelectedNeighbourAttention(SelectedDecoderAttention):
    """Replaces ``GlmAttention``."""

    def _rotate(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        _, original = type(self).__bases__
        return sys.modules[original.__module__].apply_rotary_pos_emb(q, k, *position_embeddings)


selected, __getattr__ = replacement_classes(__name__, SelectedNeighbourAttention)


class Neighbours(Llama):
    name = "transformers GLM"
    replacement_class = staticmethod(selected)
    children: tuple[str, ...] = ()


ARCHITECTURE = Neighbours()
