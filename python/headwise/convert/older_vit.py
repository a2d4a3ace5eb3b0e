"""Vision transformers in the layout of older versions of transformers: before 5.9 all of
``vit.py``, before 5.18 DINOv2 too. ``ViTAttention`` holds ``attention`` (query, key, value) and
``output``, sees no mask, and returns no attention weights; the inner module does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.checks import class_fault
from headwise.convert.inner_attention import InnerAttention
from headwise.convert.older_versions import collects_maps
from headwise.convert.registry import family, prefix_in
from headwise.convert.replacements import named, replacement_classes
from headwise.convert.transformers_attention import (
    EncoderReplacement,
    use_plain_implementation,
)
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.proof import Draw, Trial

_FAMILY = family("headwise.convert.vit")


class SelectedSelfAttention(EncoderReplacement):
    """Replaces ``ViTSelfAttention``; its output is already projected."""

    PROJECTIONS = ("attention.query", "attention.key", "attention.value", "output.dense")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`EncoderReplacement.forward`; the layers do not know whether attention weights
        are requested."""
        if options.get("output_attentions") is None:
            options["output_attentions"] = collects_maps(self)
        return super().forward(hidden_states, attention_mask, **options)

    def _place(self, name: str) -> str:
        return name.removesuffix("attention")


selected, __getattr__ = replacement_classes(
    __name__, SelectedSelfAttention, "SelfAttention", classes_of="headwise.convert.vit"
)


class OlderVisionTransformer(InnerAttention):
    name = "transformers ViT"
    inner = "attention"
    children = {
        "": ("attention", "output"),
        "attention": ("query", "key", "value"),
        "output": ("dense", "dropout"),
    }

    def refusal(self, module: nn.Module) -> str | None:
        prefix = prefix_in(_FAMILY, type(module), "Attention")
        expected = named(f"{_FAMILY[prefix]}.{prefix}SelfAttention")
        return class_fault("attention", module.attention, expected) or super().refusal(module)

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        own = module.attention
        return own.num_attention_heads, own.attention_head_size, own.dropout_prob

    def replacement(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        return selected(type(old))(old, mha)

    def trial(self, module: nn.Module) -> Trial:
        width = module.attention.query.in_features

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            use_plain_implementation(own)
            return [own(draw(2, 5, width))]

        return run


ARCHITECTURE = OlderVisionTransformer()
