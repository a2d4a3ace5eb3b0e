"""DistilBERT of transformers version 5."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

from headwise.convert.transformers_attention import SeparateProjections, attend
from headwise.nn.multihead_attention import MultiheadAttention


class SelectedDistilBertSelfAttention(DistilBertSelfAttention):
    """Stands where ``DistilBertSelfAttention`` stood.

    It is one so that transformers finds it when it collects attention maps
    (``output_attentions=True``).
    """

    def __init__(self, original: DistilBertSelfAttention, mha: MultiheadAttention):
        nn.Module.__init__(self)
        self.config = original.config
        self.is_causal = original.is_causal
        self.mha = mha

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, where asked for, maps [B, H, L, L]."""
        return attend(self.mha, hidden_states, attention_mask, self.config, kwargs)


class DistilBert(SeparateProjections):
    name = "transformers DistilBERT"

    def projections(self, module: DistilBertSelfAttention) -> dict[str, nn.Linear]:
        return {name: getattr(module, name) for name in ("q_lin", "k_lin", "v_lin", "out_lin")}

    def shape(self, module: DistilBertSelfAttention) -> tuple[int, int, float]:
        return module.n_heads, module.attention_head_size, module.dropout.p

    def successor(self, old: DistilBertSelfAttention, mha: MultiheadAttention) -> nn.Module:
        return SelectedDistilBertSelfAttention(old, mha)


ARCHITECTURE = DistilBert()
