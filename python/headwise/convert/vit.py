"""Vision transformers of transformers version 5 whose attention is ``ViTAttention``, or the same
code under another name: DeiT, DINOv2 (with registers too), I-JEPA, ViT-MAE, ViT-MSN, and the audio
spectrogram transformer, which sees a sound as an image.
"""

from __future__ import annotations

import functools

from torch import nn

from headwise.convert import older_vit
from headwise.convert.registry import Architecture, family, prefix_in
from headwise.convert.transformers_attention import EncoderStandIn, SeparateProjections, named
from headwise.nn.multihead_attention import MultiheadAttention

#: What the classes of a model begin with -> the module that has them. tests/python/test_convert.py
#: compares the attention of each with ViT's, statement by statement.
FAMILY = family(__name__)


class SelectedAttention(EncoderStandIn):
    """Stands where ``ViTAttention`` stood."""

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@functools.cache
def _selected(prefix: str) -> type[SelectedAttention]:
    # It is a ViTAttention (DeiTAttention, ...) so that transformers finds it when it collects
    # attention maps (output_attentions=True).
    original = named(f"{FAMILY[prefix]}.{prefix}Attention")
    name = f"Selected{prefix}Attention"
    return type(name, (SelectedAttention, original), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """``SelectedDeiTAttention`` and the like, made when first asked for: pickles name them."""
    prefix = name.removeprefix("Selected").removesuffix("Attention")
    if name == f"Selected{prefix}Attention" and prefix in FAMILY:
        return _selected(prefix)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class VisionTransformer(SeparateProjections):
    name = "transformers ViT"
    children = {"": SelectedAttention.PROJECTIONS}

    def of(self, module: nn.Module) -> Architecture:
        return older_vit.ARCHITECTURE if hasattr(module, older_vit.ARCHITECTURE.inner) else self

    def projections(self, module: nn.Module) -> dict[str, nn.Linear]:
        return {name: getattr(module, name) for name in self.children[""]}

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        return module.num_attention_heads, module.head_dim, module.attention_dropout

    def successor(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        return _selected(prefix_in(FAMILY, type(old), "Attention"))(old, mha)


ARCHITECTURE = VisionTransformer()
