"""Gemma 2 of transformers version 5: Llama's attention with a soft cap of the scores, c tanh(s / c)
(Gemma Team 2024, arXiv 2408.00118, section 2).

The operators know no cap. They get what it changes as a mask, c tanh(s / c) - s, for which the
scores of the chosen heads are computed once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.convert.decoder import SelectedDecoderAttention
from headwise.convert.llama import Llama
from headwise.convert.replacements import replacement_classes
from headwise.gates.selection import Selection
from headwise.nn.decoder_inputs import Masks, with_bias


class SelectedCappedAttention(SelectedDecoderAttention):
    """Replaces ``Gemma2Attention``."""

    attn_logit_softcapping: float | None

    def _scored(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Masks,
        chosen: Selection | None,
        slots: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Masks]:
        cap = self.attn_logit_softcapping
        if cap is None:
            return q, k, v, masks
        held = k
        if slots is not None:
            held = torch.ops.headwise.spread_slots(k, slots, self.num_key_value_heads)
        if chosen is None or torch.compiler.is_compiling():
            change = self._change(q, self._for_each_head(held), cap)
        else:
            ran = torch.ops.headwise.selection_mask(chosen.index, chosen.count, q.dtype)
            rows, heads = ran.nonzero(as_tuple=True)  # of each head that runs
            groups = torch.tensor(self.head_groups, device=q.device)[heads]
            own = self._change(q[rows, heads], held[rows, groups], cap)  # [heads that run, L, S]
            change = own.new_zeros(*q.shape[:3], k.size(2)).index_put((rows, heads), own)
        return q, k, v, masks._replace(attn_mask=with_bias(masks.attn_mask, change))

    def _change(self, q: Tensor, k: Tensor, cap: float) -> Tensor:
        """What the cap adds to the scores of ``q [..., L, d]`` and ``k [..., S, d]``."""
        scores = (q @ k.transpose(-1, -2)) * self.scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (cap * torch.tanh(scores / cap) - scores).to(q.dtype)


selected, __getattr__ = replacement_classes(__name__, SelectedCappedAttention)


class Gemma2(Llama):
    name = "transformers Gemma 2"
    replacement_class = staticmethod(selected)
    attributes: tuple[str, ...] = (*Llama.attributes, "attn_logit_softcapping")


ARCHITECTURE = Gemma2()
