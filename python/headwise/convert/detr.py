"""DETR of transformers version 5: queries and keys get positions, values do not. Self-attention of
the encoder, self- and cross-attention of the decoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.replacements import replacement_classes
from headwise.convert.transformers_attention import attend, use_plain_implementation
from headwise.convert.vit import SelectedAttention, VisionTransformer
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.proof import Draw, Trial


class SelectedPlacedAttention(SelectedAttention):
    """Replaces ``DetrSelfAttention`` and ``DetrCrossAttention``."""

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        encoder_position_embeddings: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D], key_value_states [B, S, D], positions of both [B, L, D] and [B,
        S, D] -> as :meth:`EncoderReplacement.forward`; ``attention_mask`` is for S."""
        query = _placed(hidden_states, position_embeddings)
        if key_value_states is None:
            return attend(self, query, attention_mask, options, query, hidden_states)
        key = _placed(key_value_states, encoder_position_embeddings)
        return attend(self, query, attention_mask, options, key, key_value_states)


def _placed(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


selected, __getattr__ = replacement_classes(__name__, SelectedPlacedAttention)


class Detr(VisionTransformer):
    name = "transformers DETR"

    def of(self, module: nn.Module) -> Detr:
        return self

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        heads = module.q_proj.out_features // module.head_dim
        return heads, module.head_dim, module.attention_dropout

    def replacement(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        return selected(type(old))(old, mha)

    def trial(self, module: nn.Module) -> Trial:
        width, cross = module.q_proj.in_features, "Cross" in type(module).__name__

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            use_plain_implementation(own)
            tokens, keys = draw(2, 5, width), 4 if cross else 5
            mask = draw.added(draw.padding(2, keys)[:, None, None, :].expand(-1, -1, 5, -1))
            placed: dict[str, Any] = {"position_embeddings": draw(2, 5, width)}
            more: dict[str, Any] = {}
            if cross:
                more["key_value_states"] = draw(2, keys, width)
                placed["encoder_position_embeddings"] = draw(2, keys, width)
            calls: list[dict[str, Any]] = [{"attention_mask": mask, **placed}, placed, {}]
            return [own(hidden_states=tokens, **more, **call)[0] for call in calls]

        return run


ARCHITECTURE = Detr()
