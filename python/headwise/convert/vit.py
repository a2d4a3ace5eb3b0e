"""Vision transformers of transformers version 5 whose attention is ``ViTAttention``, or the same
code under another name: DeiT, DINOv2 (with registers too), I-JEPA, ViT-MAE, ViT-MSN, and the audio
spectrogram transformer, which sees a sound as an image.
"""

from __future__ import annotations

from torch import nn

from headwise.convert import older_vit
from headwise.convert.registry import Architecture, family
from headwise.convert.replacements import replacement_classes
from headwise.convert.transformers_attention import EncoderReplacement, SeparateProjections
from headwise.nn.multihead_attention import MultiheadAttention

#: Prefix of a model's classes -> their module. tests/python/test_convert.py compares the attention
#: of each with ViT's, statement by statement.
FAMILY = family(__name__)


class SelectedAttention(EncoderReplacement):
    """Replaces ``ViTAttention``."""

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


selected, __getattr__ = replacement_classes(__name__, SelectedAttention)


class VisionTransformer(SeparateProjections):
    name = "transformers ViT"
    children = {"": SelectedAttention.PROJECTIONS}

    def of(self, module: nn.Module) -> Architecture:
        return older_vit.ARCHITECTURE if hasattr(module, older_vit.ARCHITECTURE.inner) else self

    def projections(self, module: nn.Module) -> dict[str, nn.Linear]:
        return {name: getattr(module, name) for name in self.children[""]}

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        return module.num_attention_heads, module.head_dim, module.attention_dropout

    def replacement(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        return selected(type(old))(old, mha)


ARCHITECTURE = VisionTransformer()
