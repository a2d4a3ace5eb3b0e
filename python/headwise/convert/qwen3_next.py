"""Qwen3-Next of transformers version 5: Qwen3's attention, and a sigmoid gate of each feature of
each head's output, made from the layer's input (Qiu et al. 2025, arXiv 2505.06708).

``q_proj`` has rows for the queries of the first head, its gate, the queries of the second head and
so on. The converted layer has copies of them in ``q_proj`` and ``gate_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.convert.decoder import SelectedDecoderAttention
from headwise.convert.llama import Llama
from headwise.convert.parameters import in_the_mode_of, remade
from headwise.convert.replacements import replacement_classes
from headwise.nn.decoder_inputs import linear, set_parameter

if TYPE_CHECKING:
    from headwise._C import LayerPlan
    from headwise.gates.selection import Selection
    from headwise.nn.grouped_query_attention import GroupedQueryAttention


class SelectedGatedAttention(SelectedDecoderAttention):
    """Replaces ``Qwen3NextAttention``; ``gate_proj.weight [H d, D]``."""

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(original, sizes, **factory)
        rows, bias = self.num_heads * self.head_dim, self.q_proj.bias is not None
        self.gate_proj = linear(self.embed_dim, rows, bias, factory)

    def pruned(self, entry: LayerPlan) -> GroupedQueryAttention:
        smaller = super().pruned(entry)
        for name, old in self.gate_proj.named_parameters():
            rows = old.detach().unflatten(0, (-1, self.head_dim))[entry.heads].flatten(0, 1)
            set_parameter(smaller.gate_proj, name, rows, old)
        return smaller

    def _filtered(self, context: Tensor, x: Tensor, chosen: Selection | None) -> Tensor:
        gate = self._project(self.gate_proj, x, self.num_heads, None, chosen)  # [B, H, L, d]
        return context * torch.sigmoid(gate)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """As :meth:`SelectedDecoderAttention.original_state`, with both projections in one."""
        for kind in ("weight", "bias"):
            own, gate = f"{name}.q_proj.{kind}", f"{name}.gate_proj.{kind}"
            if own in state:
                both = torch.cat([state[own], state.pop(gate)]).unflatten(
                    0, (2, self.num_heads, -1)
                )
                state[own] = both.transpose(0, 1).flatten(0, 2)  # from [H, 2, d, ...]
        super().original_state(name, state)


selected, __getattr__ = replacement_classes(__name__, SelectedGatedAttention)


class Qwen3Next(Llama):
    name = "transformers Qwen3-Next"
    replacement_class = staticmethod(selected)

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        sizes = super().sizes(module)
        return {**sizes, "num_heads": sizes["num_heads"] // 2}

    def widths(self, sizes: Mapping[str, int]) -> list[int]:
        query, key, value = super().widths(sizes)
        return [2 * query, key, value]

    def _faults(
        self, module: nn.Module, linears: Mapping[str, nn.Module], sizes: Mapping[str, Any]
    ) -> Iterator[str | None]:
        yield from super()._faults(module, linears, sizes)
        yield from self._packed_faults(module, "q_proj", linears["q_proj"])

    def copied_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return list(module.q_proj.parameters())

    def convert(self, module: nn.Module) -> tuple[nn.Module, GroupedQueryAttention]:
        replacement, layer = super().convert(module)
        rows = layer.num_heads * layer.head_dim
        for i, name in enumerate(("q_proj", "gate_proj")):

            def cut(sources: Sequence[Tensor], i: int = i) -> Tensor:
                parts = sources[0].unflatten(0, (layer.num_heads, 2, -1))[:, i]
                return parts.flatten(0, 1).contiguous()

            own = linear(layer.embed_dim, rows, module.q_proj.bias is not None, {"device": "meta"})
            for kind, tensor in module.q_proj.named_parameters():
                setattr(own, kind, remade([tensor], cut))
            in_the_mode_of(module, own)
            setattr(layer, name, own)
        return replacement, layer


ARCHITECTURE = Qwen3Next()
