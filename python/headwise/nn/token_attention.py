"""Attention whose heads are chosen by every token, head by head over the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.gates.selection import TokenSelection
from headwise.nn.attention_inputs import AttentionInputs

_ops = torch.ops.headwise

#: Queries that share one range of keys where they may only attend to earlier ones.
_CAUSAL_ROWS = 512


class Projections(NamedTuple):
    """A layer's weights; E = H d."""

    q_weight: Tensor  # [E, D]
    k_weight: Tensor  # [E, Dk]
    v_weight: Tensor  # [E, Dv]
    q_bias: Tensor | None  # [E]
    k_bias: Tensor | None
    v_bias: Tensor | None
    out_weight: Tensor  # [Dout, E]
    out_bias: Tensor | None  # [Dout]
    bias_k: Tensor | None  # [1, 1, E]
    bias_v: Tensor | None
    add_zero_attn: bool

    def of_heads(self, heads: list[int], num_heads: int) -> Projections:
        """Those of some heads."""
        if len(heads) == num_heads:
            return self
        width = self.q_weight.size(0) // num_heads
        device = self.q_weight.device
        rows = torch.tensor(heads, dtype=torch.int64, device=device)[:, None] * width
        rows = (rows + torch.arange(width, device=device)).flatten()

        def take(weight: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if weight is None else weight.index_select(dim, rows)

        values: list[Any] = [take(weight) for weight in self[:6]]
        values += [take(self.out_weight, 1), self.out_bias]
        values += [take(self.bias_k, 2), take(self.bias_v, 2), self.add_zero_attn]
        return Projections(*values)


def attend_tokens(
    inputs: AttentionInputs,
    weights: Projections,
    num_heads: int,
    selection: TokenSelection,
    dropout_p: float = 0.0,
) -> Tensor:
    """``[B, L, Dout]``: for every token the sum of its heads' outputs, weighted and projected.

    A head's queries and attention are computed for the tokens that chose it, forward and backward;
    its keys, values and output projection where a token of the batch did. Sequences of a batch
    are computed together: where fewer tokens of one chose a head than of another, some of its other
    tokens fill up, with weight 0. The lists of tokens are read by the host.
    """
    batch, length = inputs.query.shape[:2]
    counts = selection.chosen.sum(1)  # [B, H]
    most = counts.amax(0).tolist() if batch else [0] * num_heads
    used = [head for head in range(num_heads) if most[head] > 0]
    own = weights.of_heads(used, num_heads)
    if not used:
        zeros = inputs.query.new_zeros(batch, length, 0)
        return F.linear(zeros, own.out_weight[:, :0], own.out_bias)
    _, k, v = _ops.project_heads(
        inputs.query[:, :0],
        inputs.key,
        inputs.value,
        *own[:6],
        len(used),
        own.bias_k,
        own.bias_v,
        own.add_zero_attn,
    )  # [B, U, S', d]
    contexts, places = [], []
    for place, head in enumerate(used):
        # The tokens that chose the head come first, in their order.
        chosen = selection.chosen[:, :, head]
        tokens = chosen.byte().argsort(stable=True, dim=1, descending=True)[
            :, : most[head]
        ]  # [B, n]
        ran = torch.arange(most[head], device=tokens.device) < counts[:, head, None]
        factor = selection.weight[:, :, head].gather(1, tokens).masked_fill(~ran, 0.0)
        rows = (tokens + length * torch.arange(batch, device=tokens.device)[:, None]).flatten()
        columns = slice(place * k.size(3), (place + 1) * k.size(3))
        q = F.linear(
            inputs.query.flatten(0, 1).index_select(0, rows),
            own.q_weight[columns],
            None if own.q_bias is None else own.q_bias[columns],
        ).unflatten(0, (batch, -1))  # [B, n, d]
        context = torch.cat(
            [
                _attend(
                    inputs, q[:, part], k[:, place], v[:, place], tokens[:, part], head, dropout_p
                )
                for part in _parts(inputs, most[head])
            ],
            1,
        )  # [B, n, d]
        contexts.append((context * factor[..., None].to(context.dtype)).flatten(0, 1))
        places.append(rows * len(used) + place)
    # One product over all heads, with zeros where a token did not choose one, costs less than
    # adding up the products of each.
    heads = contexts[0].new_zeros(batch * length * len(used), k.size(3))
    heads = heads.index_copy(0, torch.cat(places), torch.cat(contexts))
    return F.linear(heads.view(batch, length, -1), own.out_weight, own.out_bias)


def _parts(inputs: AttentionInputs, rows: int) -> Iterator[slice]:
    step = _CAUSAL_ROWS if inputs.is_causal else rows
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _attend(
    inputs: AttentionInputs,
    q: Tensor,  # [B, n, d]
    k: Tensor,  # [B, S', d]
    v: Tensor,
    tokens: Tensor,  # [B, n]
    head: int,
    dropout_p: float,
) -> Tensor:
    """``[B, n, d]``."""
    keys = inputs.key.size(1)
    added = k.size(1) - keys
    padding, mask = inputs.key_padding_mask, inputs.attn_mask
    if mask is not None and not inputs.is_causal:
        of_head = mask.expand(tokens.size(0), *mask.shape) if mask.dim() == 2 else mask[:, head]
        mask = of_head.gather(1, tokens[..., None].expand(-1, -1, keys))[:, None]  # [B, 1, n, S]
    elif inputs.is_causal:
        if added == 0:  # later keys are seen by none of these tokens
            keys = min(keys, int(tokens.max()) + 1)
            k, v = k[:, :keys], v[:, :keys]
            padding = None if padding is None else padding[:, :keys]
        later = torch.arange(keys, device=tokens.device) > tokens[..., None]
        mask = later[:, None]
    return _ops.dense_attention(
        q[:, None], k[:, None], v[:, None], padding, mask, False, dropout_p, None, added_keys=added
    )[:, 0]


def mask_tokens(context: Tensor, selection: TokenSelection) -> Tensor:
    """Every head's output ``[B, H, L, d]`` times its weight for each token."""
    factor = selection.weight.masked_fill(~selection.chosen, 0.0)
    return context * factor.to(context.dtype).transpose(1, 2)[..., None]
