"""gpt-oss of transformers version 5: Llama's attention with a learned sink for each head, a score
of no key that takes a share of the softmax (OpenAI 2025, arXiv 2508.10925, section 2.2; Xiao et al.
2023, arXiv 2309.17453).

The operators get the sink as one more key with the value zero, and one more feature by which that
key, and no other, has the sink as its score.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.convert.decoder import SelectedDecoderAttention, cache_word, decoder_outputs
from headwise.convert.llama import Llama
from headwise.convert.replacements import replacement_classes
from headwise.nn.decoder_inputs import Masks, set_parameter
from headwise.nn.proof import Trial

if TYPE_CHECKING:
    from headwise._C import LayerPlan
    from headwise.gates.selection import Selection
    from headwise.nn.grouped_query_attention import GroupedQueryAttention


class SelectedSinkAttention(SelectedDecoderAttention):
    """Replaces ``GptOssAttention``; ``sinks [H]``."""

    _added_keys = 1

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        self.sinks = nn.Parameter(torch.empty(self.num_heads, **factory))

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.forward`, with an angle for each pair of features."""
        if position_embeddings is not None:
            cos, sin = position_embeddings  # [B or 1, L, d / 2]
            position_embeddings = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return super().forward(hidden_states, position_embeddings, attention_mask, cache, **options)

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        smaller = super().pruned(entry)
        set_parameter(smaller, "sinks", self.sinks.detach()[entry.heads], self.sinks)
        return smaller

    def _scored(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Masks,
        chosen: Selection | None,
        slots: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Masks]:
        sinks = (self.sinks / self.scale).to(q.dtype)[None, :, None, None]
        q = torch.cat([q, sinks.expand(*q.shape[:3], 1)], dim=-1)  # [B, H, L, d + 1]
        mark = F.pad(k.new_zeros(*k.shape[:3], 1), (0, 0, 0, 1), value=1.0)
        k = torch.cat([F.pad(k, (0, 0, 0, 1)), mark], dim=-1)  # [B, Hkv, S + 1, d + 1]
        return q, k, F.pad(v, (0, 0, 0, 1)), masks

    def _weights(self, q: Tensor, k: Tensor, selection: Selection | None, masks: Masks) -> Tensor:
        return super()._weights(q, k, selection, masks)[..., :-1]


selected, __getattr__ = replacement_classes(__name__, SelectedSinkAttention)


class GptOss(Llama):
    name = "transformers gpt-oss"
    replacement_class = staticmethod(selected)
    children = ()
    parameters = ("sinks",)

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> SelectedSinkAttention:
        replacement = super().replacement(module, sizes)
        assert isinstance(replacement, SelectedSinkAttention)
        replacement.sinks = module.sinks
        return replacement

    def trial(self, module: nn.Module) -> Trial:
        return functools.partial(
            decoder_outputs,
            width=module.o_proj.out_features,
            rope=module.head_dim // 2,  # an angle for each pair of features
            cache_word=cache_word(module),
        )


ARCHITECTURE = GptOss()
