"""DistilBERT of transformers version 5."""

from __future__ import annotations

from torch import nn
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

from headwise.convert.transformers_attention import EncoderReplacement, SeparateProjections
from headwise.nn.multihead_attention import MultiheadAttention


class SelectedDistilBertSelfAttention(EncoderReplacement, DistilBertSelfAttention):  # type: ignore[misc]
    """Replaces ``DistilBertSelfAttention``.

    It derives from it so that transformers finds it when it collects attention weights
    (``output_attentions=True``).
    """

    PROJECTIONS = ("q_lin", "k_lin", "v_lin", "out_lin")


class DistilBert(SeparateProjections):
    name = "transformers DistilBERT"
    children = {"": (*SelectedDistilBertSelfAttention.PROJECTIONS, "dropout")}

    def projections(self, module: DistilBertSelfAttention) -> dict[str, nn.Linear]:
        return {name: getattr(module, name) for name in self.children[""][:4]}

    def shape(self, module: DistilBertSelfAttention) -> tuple[int, int, float]:
        return module.n_heads, module.attention_head_size, module.dropout.p

    def replacement(self, old: DistilBertSelfAttention, mha: MultiheadAttention) -> nn.Module:
        return SelectedDistilBertSelfAttention(old, mha)


ARCHITECTURE = DistilBert()
