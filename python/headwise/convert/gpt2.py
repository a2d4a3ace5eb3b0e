"""GPT-2 of transformers version 5: one fused projection ``c_attn`` with its matrix the other way
round, learned positions, as many key/value heads as query heads.

The converted layer has copies of the parameters, in the layout of ``torch.nn.Linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from headwise.convert.decoder import IMPLEMENTATION, SelectedDecoderAttention
from headwise.convert.registry import Architecture
from headwise.convert.torch_attention import carry_hooks, replaced_text
from headwise.convert.transformers_attention import name_implementation
from headwise.nn.grouped_query_attention import GroupedQueryAttention


class SelectedGPT2Attention(SelectedDecoderAttention, GPT2Attention):
    """Stands where ``GPT2Attention`` stood.

    It is a ``GPT2Attention`` so that transformers finds it when it collects attention maps
    (``output_attentions=True``).
    """

    def __init__(self, original: GPT2Attention, gqa: GroupedQueryAttention):
        super().__init__(original, gqa)
        self.resid_dropout = original.resid_dropout

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **options,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.forward`, with GPT-2's order of arguments."""
        if options.get("output_attentions") is None:  # GPT-2's model does not hand this down
            options["output_attentions"] = _collects_maps(self.config)
        output, maps = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **options,
        )
        return self.resid_dropout(output), maps


def _collects_maps(config) -> bool:
    """Whether the model was asked for attention maps in the call that is under way."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return getattr(config, "output_attentions", False)
    return "attentions" in (collector.get() or ())


class GPT2(Architecture):
    name = "transformers GPT-2"

    def refusal(self, module: GPT2Attention) -> str | None:
        if module.is_cross_attention:
            return "it is cross-attention"
        for name in ("c_attn", "c_proj"):
            projection = getattr(module, name)
            if type(projection) is not Conv1D:
                return replaced_text(name, projection)
        return None

    def copied_parameters(self, module: GPT2Attention) -> list[nn.Parameter]:
        return [*module.c_attn.parameters(), *module.c_proj.parameters()]

    def convert(self, module: GPT2Attention) -> tuple[nn.Module, GroupedQueryAttention]:
        gqa = GroupedQueryAttention(
            module.embed_dim,
            module.num_heads,
            dropout=module.attn_dropout.p,
            bias=True,
            scale=module.scaling,
            device="meta",
        )
        with torch.no_grad():
            matrices = (*module.c_attn.weight.chunk(3, dim=1), module.c_proj.weight)  # [D, D] each
            biases = (*module.c_attn.bias.chunk(3), module.c_proj.bias)  # [D] each
            linears = (gqa.q_proj, gqa.k_proj, gqa.v_proj, gqa.o_proj)
            like = (module.c_attn,) * 3 + (module.c_proj,)
            for linear, matrix, bias, old in zip(linears, matrices, biases, like, strict=True):
                linear.weight = nn.Parameter(matrix.t().contiguous(), old.weight.requires_grad)
                linear.bias = nn.Parameter(bias.clone(), old.bias.requires_grad)
        successor = SelectedGPT2Attention(module, gqa)
        successor.train(module.training)
        carry_hooks(module, successor)
        return successor, gqa

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [module.config for module in converted], IMPLEMENTATION)


ARCHITECTURE = GPT2()
