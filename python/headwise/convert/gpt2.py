"""GPT-2 of transformers version 5: one fused projection ``c_attn`` with a transposed matrix,
learned positions, as many key/value heads as query heads.

The converted layer has copies of the parameters, in the layout of ``torch.nn.Linear``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from headwise.convert.checks import (
    children_fault,
    copied_fault,
    first,
    forward_fault,
    hooks_fault,
    implementation_fault,
    projection_fault,
    renamed_fault,
)
from headwise.convert.decoder import (
    IMPLEMENTATION,
    SelectedDecoderAttention,
    cache_word,
    decoder_outputs,
)
from headwise.convert.older_versions import gpt2_scale
from headwise.convert.parameters import in_the_mode_of, remade
from headwise.convert.registry import Architecture
from headwise.convert.transformers_attention import name_implementation
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import carry_hooks
from headwise.nn.proof import Trial

_PROJECTIONS = ("c_attn", "c_proj")


class SelectedGPT2Attention(SelectedDecoderAttention, GPT2Attention):
    """Replaces ``GPT2Attention``.

    It is a ``GPT2Attention`` so that transformers finds it when it collects attention weights
    (``output_attentions=True``).
    """

    rotates = False

    def __init__(self, original: GPT2Attention, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        self.resid_dropout = original.resid_dropout

    @property
    def c_proj(self) -> nn.Module:  # type: ignore[override]
        """The output projection, by the name that GPT-2's initialisation of weights knows."""
        return self.o_proj

    @property
    def bias(self) -> Tensor:
        """The causal mask that this class has before 5.3, and initialises: a place to write to."""
        length = self.config.max_position_embeddings
        return torch.empty(1, 1, length, length, dtype=torch.bool)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """As :meth:`SelectedDecoderAttention.original_state`: ``Conv1D`` has a transposed
        matrix."""
        for kind in ("weight", "bias"):
            q, k, v, o = (state.pop(f"{name}.{p}_proj.{kind}").t() for p in "qkvo")
            state[f"{name}.c_attn.{kind}"] = torch.cat([q, k, v], dim=-1).contiguous()
            state[f"{name}.c_proj.{kind}"] = o.contiguous()

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`SelectedDecoderAttention.forward`, with GPT-2's order of arguments."""
        output, maps = super().forward(
            hidden_states, attention_mask=attention_mask, cache=cache, **options
        )
        return self.resid_dropout(output), maps


class GPT2(Architecture):
    name = "transformers GPT-2"

    def refusal(self, module: GPT2Attention) -> str | None:
        if module.is_cross_attention:
            return "it is cross-attention"
        return first(self._faults(module))

    def _faults(self, module: GPT2Attention) -> Iterator[str | None]:
        yield forward_fault("", module)
        held = (*_PROJECTIONS, "attn_dropout", "resid_dropout")
        yield children_fault("", module, held, ("bias", "masked_bias"))  # of older versions
        for name in _PROJECTIONS:
            projection = getattr(module, name)
            yield projection_fault(name, projection, Conv1D)
            yield hooks_fault(name, projection)
            for kind, parameter in projection.named_parameters():
                yield copied_fault(f"{name}.{kind}", parameter)
        yield renamed_fault(module)
        yield implementation_fault(module.config)

    def copied_parameters(self, module: GPT2Attention) -> list[nn.Parameter]:
        return [*module.c_attn.parameters(), *module.c_proj.parameters()]

    def trial(self, module: GPT2Attention) -> Trial:
        return functools.partial(
            decoder_outputs, width=module.embed_dim, rope=None, cache_word=cache_word(module)
        )

    def convert(self, module: GPT2Attention) -> tuple[nn.Module, GroupedQueryAttention]:
        sizes = {
            "embed_dim": module.embed_dim,
            "num_heads": module.num_heads,
            "dropout": module.attn_dropout.p,
            "bias": True,
            "scale": gpt2_scale(module),
        }
        replacement = SelectedGPT2Attention(module, sizes, device="meta")
        places = [(module.c_attn, i) for i in range(3)] + [(module.c_proj, None)]
        linears = (replacement.q_proj, replacement.k_proj, replacement.v_proj, replacement.o_proj)
        for linear, (old, third) in zip(linears, places, strict=True):

            def own(sources: Sequence[Tensor], third: int | None = third) -> Tensor:
                (tensor,) = sources  # [D, 3 D] or [D, D], or a bias
                part = tensor if third is None else tensor.chunk(3, dim=-1)[third]
                return part.t().contiguous() if part.dim() == 2 else part.clone()

            linear.weight = remade([old.weight], own)
            linear.bias = remade([old.bias], own)
        in_the_mode_of(module, replacement, *linears)
        carry_hooks(module, replacement)
        return replacement, replacement

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [module.config for module in converted], IMPLEMENTATION)


ARCHITECTURE = GPT2()
