"""ALBERT of transformers version 5: one layer (or a few) that the model runs many times.

``AlbertAttention`` holds query, key, value, the output projection and what follows it. It gives way
to a module of the same forward around one :class:`headwise.MultiheadAttention`, which the model
calls once for each of its layers: the weights are shared, and so is the gate, but each call chooses
heads of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.albert.modeling_albert import AlbertAttention

from headwise.convert.bert import attend, name_implementation
from headwise.convert.registry import Architecture
from headwise.convert.torch_attention import carry_hooks
from headwise.multihead_attention import MultiheadAttention


class SelectedAlbertAttention(AlbertAttention):
    """Stands where ``AlbertAttention`` stood.

    It is an ``AlbertAttention`` so that transformers finds it when it collects attention maps
    (``output_attentions=True``).
    """

    def __init__(self, original: AlbertAttention, mha: MultiheadAttention):
        nn.Module.__init__(self)
        self.config = original.config
        self.is_causal = original.is_causal
        self.mha = mha
        self.output_dropout = original.output_dropout
        self.LayerNorm = original.LayerNorm

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, where asked for, maps [B, H, L, L]."""
        output, maps = attend(self.mha, hidden_states, attention_mask, self.config, kwargs)
        return self.LayerNorm(hidden_states + self.output_dropout(output)), maps


class Albert(Architecture):
    name = "transformers ALBERT"

    def refusal(self, module: AlbertAttention) -> str | None:
        for name in ("query", "key", "value", "dense"):
            linear = getattr(module, name)
            if type(linear) is not nn.Linear:
                return f"its {name} was replaced by a {type(linear).__name__}"
        states = {
            (p.dtype, p.device, p.requires_grad)
            for linear in (module.query, module.key, module.value)
            for p in linear.parameters()
        }
        if len(states) > 1:
            return "its query, key and value differ in dtype, device or requires_grad"
        return None

    def copied_parameters(self, module: AlbertAttention) -> list[nn.Parameter]:
        return [
            p for linear in (module.query, module.key, module.value) for p in linear.parameters()
        ]

    def convert(self, module: AlbertAttention) -> tuple[nn.Module, MultiheadAttention]:
        projections = (module.query, module.key, module.value)
        mha = MultiheadAttention(
            module.dense.out_features,
            module.num_attention_heads,
            dropout=module.attention_dropout.p,
            batch_first=True,
            device="meta",
            head_dim=module.attention_head_size,
        )
        with torch.no_grad():
            weight = torch.cat([p.weight for p in projections])  # [3E, D]
            bias = torch.cat([p.bias for p in projections])  # [3E]
        trained = module.query.weight.requires_grad
        mha.in_proj_weight = nn.Parameter(weight, requires_grad=trained)
        mha.in_proj_bias = nn.Parameter(bias, requires_grad=trained)
        mha.out_proj.weight = module.dense.weight  # [D, E]
        mha.out_proj.bias = module.dense.bias  # [D]
        successor = SelectedAlbertAttention(module, mha)
        successor.train(module.training)
        carry_hooks(module, successor)
        return successor, mha

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [attention.config for attention in converted])


ARCHITECTURE = Albert()
