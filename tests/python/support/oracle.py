"""The oracle: compute every head, multiply each by its weight (0 if not chosen), project.

Everything that executes a selection, on any device, is compared with these few lines. Dropout has
its own mask (``keep``), because the operators draw theirs from a counter.
"""

import math

import torch


def dense_weight(index, count, weight):
    """[B, H]: `weight` where the head was chosen, 0 elsewhere."""
    chosen = torch.zeros_like(weight)
    for b in range(index.shape[0]):
        chosen[b, index[b, : int(count[b])].long()] = 1
    return weight * chosen


def attention(
    q,  # [B, H, L, d]
    k,  # [B, Hkv, S, d]
    v,  # [B, Hkv, S, dv]
    key_padding_mask=None,  # [B, S]
    attn_mask=None,  # broadcastable to [B, H, L, S]
    is_causal=False,
    scale=None,
    added=0,  # the last `added` keys are outside every mask
    keep=None,  # [B, H, L, S]: what dropout multiplies the probabilities by
):
    """softmax(scale q k' + masks) v for every head; rows that see no key give zeros."""
    queries, keys = q.shape[2], k.shape[2] - added
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    v = v.repeat_interleave(q.shape[1] // max(v.shape[1], 1), 1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = q @ k.transpose(2, 3) * scale  # [B, H, L, S + added]
    bias = torch.zeros(*q.shape[:3], keys, dtype=q.dtype, device=q.device)
    if key_padding_mask is not None:
        bias = bias + additive(key_padding_mask, q.dtype)[:, None, None, :]
    if attn_mask is not None:
        bias = bias + additive(attn_mask, q.dtype)
    if is_causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1)
        bias = bias + additive(hidden, q.dtype)
    scores = scores + torch.nn.functional.pad(bias, (0, added))
    sees = (scores > -math.inf).any(-1, keepdim=True)
    probabilities = torch.where(sees, scores, 0).softmax(-1) * sees
    if keep is not None:
        probabilities = probabilities * keep
    return probabilities @ v


def additive(mask, dtype):
    """A mask as torch.nn.MultiheadAttention reads it, in the form that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def multihead_attention(
    query,  # [B, L, D]
    key,  # [B, S, Dk]
    value,  # [B, S, Dv]
    q_weight,
    k_weight,
    v_weight,
    q_bias,
    k_bias,
    v_bias,
    out_proj_weight,
    out_proj_bias,
    num_heads,
    index,
    count,
    weight,
    bias_k=None,
    bias_v=None,
    add_zero_attn=False,
    key_padding_mask=None,
    attn_mask=None,
    is_causal=False,
    scale=None,
    keep=None,
):
    """-> [B, L, D]."""
    linear = torch.nn.functional.linear
    batch, queries, _ = query.shape
    if num_heads == 0:
        y = query.new_zeros(batch, queries, out_proj_weight.shape[0])
        return y if out_proj_bias is None else y + out_proj_bias
    k, v = linear(key, k_weight, k_bias), linear(value, v_weight, v_bias)  # [B, S, E]
    added = 0
    if bias_k is not None:
        k = torch.cat([k, bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, bias_v.expand(batch, 1, -1)], 1)
        added += 1
    if add_zero_attn:
        k, v = torch.nn.functional.pad(k, (0, 0, 0, 1)), torch.nn.functional.pad(v, (0, 0, 0, 1))
        added += 1

    def heads(x):  # [B, ., E] -> [B, H, ., d]
        return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)

    context = attention(
        heads(linear(query, q_weight, q_bias)),
        heads(k),
        heads(v),
        key_padding_mask,
        attn_mask,
        is_causal,
        scale,
        added,
        keep,
    )
    context = context * dense_weight(index, count, weight).to(query.dtype)[:, :, None, None]
    return linear(context.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)


def self_attention(
    x,
    in_proj_weight,
    in_proj_bias,
    out_proj_weight,
    out_proj_bias,
    num_heads,
    index,
    count,
    weight,
    **arguments,
):
    """x [B, L, D] -> [B, L, D]."""
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    return multihead_attention(
        x,
        x,
        x,
        *in_proj_weight.chunk(3),
        *biases,
        out_proj_weight,
        out_proj_bias,
        num_heads,
        index,
        count,
        weight,
        **arguments,
    )


def random_selection(batch, num_heads, generator, device="cpu", dtype=torch.float32, count=None):
    """Random heads for every sequence: index int32 [B, H], count int32 [B], weight [B, H]."""
    if count is None:
        count = torch.randint(0, num_heads + 1, (batch,), generator=generator)
    else:
        count = torch.as_tensor(count).expand(batch)
    index = torch.full((batch, num_heads), -1)
    weight = torch.zeros(batch, num_heads, dtype=torch.float64)
    for b in range(batch):
        heads = torch.randperm(num_heads, generator=generator)[: int(count[b])].sort().values
        index[b, : len(heads)] = heads
        weight[b, heads] = torch.rand(len(heads), generator=generator, dtype=torch.float64) + 0.5
    return index.int().to(device), count.int().to(device), weight.to(device, dtype)
