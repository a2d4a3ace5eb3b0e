"""The statistics of attention by the plain formula in float64, and the masks to try them with."""

import math

import torch

INF = float("inf")


def plain(q, k, key_padding_mask=None, query_padding_mask=None, attn_mask=None, is_causal=False):
    """The whole map, row by row: entropy / ln(visible keys) and the largest probability."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    B, H, L, d = q.shape
    S = k.shape[2]
    s = q @ k.mT / math.sqrt(d)  # [B, H, L, S]
    for mask in (None if key_padding_mask is None else key_padding_mask[:, None, None], attn_mask):
        if mask is not None:
            s = s.masked_fill(mask, -INF) if mask.dtype == torch.bool else s + mask.double()
    if is_causal:
        s = s.masked_fill(torch.ones(L, S).triu(1).bool(), -INF)
    visible = (s != -INF).sum(-1)  # [B, H, L]
    p = s.softmax(-1).nan_to_num(0.0)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    entropy = torch.where(visible > 1, entropy / visible.double().clamp(min=2).log(), 0.0)
    confidence = p.amax(-1) if S else torch.zeros(B, H, L).double()
    rows = torch.ones(B, L).bool() if query_padding_mask is None else ~query_padding_mask
    rows = rows[:, None].double()  # [B, 1, L]
    count = rows.sum(-1).clamp(min=1)
    return (entropy * rows).sum(-1) / count, (confidence * rows).sum(-1) / count


def masks(kind, B, H, L, S):
    if kind == "padding":
        key = torch.arange(S) >= torch.randint(1, S + 1, (B, 1))
        query = torch.arange(L) >= torch.randint(0, L + 1, (B, 1))  # some sequences all padding
        return {"key_padding_mask": key, "query_padding_mask": query}
    if kind == "scattered padding":
        return {"key_padding_mask": torch.rand(B, S) < 0.4}
    if kind == "float padding":
        bias = torch.randn(B, S)
        bias[:, S // 2] = -INF
        return {"key_padding_mask": bias}
    if kind == "boolean":
        return {"attn_mask": torch.rand(B, 1, L, S) < 0.5}
    if kind == "float":
        return {"attn_mask": torch.randn(H, 1, S) * 3}
    if kind == "fully masked rows":
        mask = torch.rand(L, S) < 0.3
        mask[::2] = True
        return {"attn_mask": mask}
    if kind == "causal":
        return {"is_causal": True, "key_padding_mask": torch.rand(B, S) < 0.2}
    return {}


KINDS = ["none", "padding", "scattered padding", "float padding", "boolean", "float"]
KINDS += ["fully masked rows", "causal"]
SHAPES = [(2, 4, 2, 70, 600, 16), (3, 3, 3, 1, 1, 8), (1, 6, 2, 33, 129, 24), (2, 2, 1, 130, 5, 64)]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5)]
