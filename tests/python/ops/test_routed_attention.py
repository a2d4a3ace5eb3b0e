"""routed_multihead_attention: heads chosen by every token, against every head masked afterwards."""

from __future__ import annotations

import headwise  # noqa: F401  registers the operators
import pytest
import torch
from torch.library import opcheck

ops = torch.ops.headwise


def oracle(query, key, value, weights, biases, out, out_bias, heads, chosen, weight, more):
    """Every head of every token in float64, times the weight where it was chosen."""
    wide = [None if t is None else t.double() for t in (query, key, value, *weights, *biases)]
    query, key, value, wq, wk, wv, bq, bk, bv = wide
    q, k, v = (
        torch.nn.functional.linear(x, w, b)
        for x, w, b in ((query, wq, bq), (key, wk, bk), (value, wv, bv))
    )
    for row_k, row_v in more.get("added", ()):
        one = [
            torch.zeros_like(k[:, :1]) if r is None else r.double().expand(len(k), 1, -1)
            for r in (row_k, row_v)
        ]
        k, v = torch.cat([k, one[0]], 1), torch.cat([v, one[1]], 1)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, L, d]
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5
    keys = key.size(1)
    if (mask := more.get("key_padding_mask")) is not None:
        scores[..., :keys] = scores[..., :keys].masked_fill(mask[:, None, None], -torch.inf)
    if (mask := more.get("attn_mask")) is not None:
        scores = torch.cat([scores[..., :keys] + mask.double(), scores[..., keys:]], 3)
    if more.get("is_causal"):
        future = torch.ones(scores.size(2), keys, dtype=torch.bool).triu(1)
        scores[..., :keys] = scores[..., :keys].masked_fill(future, -torch.inf)
    context = scores.softmax(3) @ v  # [B, H, L, d]
    factor = torch.where(chosen, weight.double(), 0.0).transpose(1, 2)[..., None]
    joined = (context * factor).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(
        joined, out.double(), None if out_bias is None else out_bias.double()
    )


def make(
    batch=2,
    length=9,
    keys=None,
    width=16,
    heads=4,
    head_dim=8,
    dtype=torch.float32,
    bias=True,
    seed=0,
):
    torch.manual_seed(seed)
    keys = keys or length
    inner = heads * head_dim

    def random(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(dtype)

    x = random(batch, length, width)
    other = x if keys == length else random(batch, keys, width)
    weights = [random(inner, width, scale=width**-0.5) for _ in range(3)]
    biases = [random(inner, scale=0.3) if bias else None for _ in range(3)]
    out, out_bias = random(width, inner, scale=inner**-0.5), random(width) if bias else None
    chosen = torch.rand(batch, length, heads) < 0.5
    return (
        x,
        other,
        other,
        weights,
        biases,
        out,
        out_bias,
        heads,
        chosen,
        random(batch, length, heads),
    )


def run(case, op=None, **more):
    query, key, value, weights, biases, out, out_bias, heads, chosen, weight = case
    (bias_k, bias_v), zero = more.pop("rows", (None, None)), more.pop("zero", False)
    call = op or ops.routed_multihead_attention
    return call(
        query, key, value, *weights, *biases, out, out_bias, heads, chosen, weight,
        bias_k, bias_v, zero, more.get("key_padding_mask"), more.get("attn_mask"),
        more.get("is_causal", False), more.get("dropout_p", 0.0), more.get("dropout_seed"), None,
    )  # fmt: skip


TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 4e-3,
}


def close(got, want, dtype):
    bound = TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    assert got.dtype == dtype
    assert (got.double() - want).abs().max().item() <= bound


def masks(kind, batch, length, keys):
    if kind == "padding":
        ends = torch.randint(1, keys + 1, (batch,))
        return {"key_padding_mask": torch.arange(keys) >= ends[:, None]}
    if kind == "hole":
        mask = torch.rand(batch, keys) < 0.3
        mask[:, 0] = False
        return {"key_padding_mask": mask}
    if kind == "causal":
        return {"is_causal": True}
    return {"attn_mask": torch.randn(length, keys)} if kind == "additive" else {}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["none", "padding", "hole", "causal", "additive"])
@pytest.mark.parametrize(
    "size", [(2, 9, 16, 4, 8), (1, 150, 24, 3, 16), (3, 70, 10, 2, 5)], ids=str
)
def test_equals_every_head_masked(dtype, kind, size):
    batch, length, width, heads, head_dim = size
    case = make(batch, length, None, width, heads, head_dim, dtype)
    more = masks(kind, batch, length, length)
    close(run(case, **more), oracle(*case, more), dtype)
    close(run(case, ops._aten_routed_multihead_attention, **more), oracle(*case, more), dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_result(dtype, threads):
    """One head and long: several workers divide its queries by rows."""
    case = make(1, 400, None, 16, 1, 8, dtype)
    more = {"is_causal": True}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        close(run(case, **more), oracle(*case, more), dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ragged_counts_heads_that_no_token_chose_and_tokens_without_a_head(dtype):
    case = list(make(3, 140, dtype=dtype))
    chosen = torch.zeros(3, 140, 4, dtype=torch.bool)
    chosen[0, 5, 0] = True  # one token
    chosen[0, :, 1] = True  # all of them
    chosen[1, 100:, 2] = True  # of one sequence only; head 3, sequence 2: none
    case[8] = chosen
    got = run(case)
    close(got, oracle(*case, {}), dtype)
    assert torch.equal(got[2], case[6].expand(140, -1))


def test_a_head_that_no_token_chose_is_not_read():
    case = list(make(dtype=torch.float32))
    case[8][..., 2] = False
    clean = run(case)
    for t in (*case[3], *case[4]):
        t[16:24] = torch.nan
    case[5][:, 16:24] = torch.nan
    assert torch.equal(run(case), clean)


@pytest.mark.parametrize("keys", [9, 13])
def test_added_rows_and_other_keys(keys):
    case = make(2, 9, keys, dtype=torch.float64)
    rows = torch.randn(2, 32, dtype=torch.float64)
    more = {"added": [(rows[0], rows[1]), (None, None)]}
    masked = masks("padding", 2, 9, keys)
    got = run(case, rows=tuple(rows), zero=True, **masked)
    close(got, oracle(*case, more | masked), torch.float64)


def gradients(output, tensors, seed=3):
    torch.manual_seed(seed)
    direction = torch.randn(output.shape, dtype=torch.float64)
    return torch.autograd.grad((output.double() * direction).sum(), tensors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "additive"])
@pytest.mark.parametrize("size", [(2, 9, 16, 4, 8), (2, 140, 24, 3, 16)], ids=str)
def test_gradients_equal_those_of_every_head_masked(dtype, kind, size):
    batch, length, width, heads, head_dim = size
    case = make(batch, length, None, width, heads, head_dim, dtype)
    more = masks(kind, batch, length, length)
    x, _, _, weights, biases, out, out_bias, _, _, weight = case
    tensors = [x, *weights, *biases, out, out_bias, weight]
    if kind == "additive":
        more["attn_mask"] = more["attn_mask"].to(dtype)
        tensors.append(more["attn_mask"])
    for t in tensors:
        t.requires_grad_()
    got = gradients(run(case, **more), tensors)
    want = gradients(oracle(*case, more), tensors)
    for one, other in zip(got, want, strict=True):
        close(one, other.double(), dtype)


def test_gradcheck():
    case = make(2, 5, 6, 6, 2, 3, torch.float64)
    query, key, value, weights, biases, out, out_bias, heads, chosen, weight = case
    value = value.clone()
    rows = torch.randn(2, 6, dtype=torch.float64)
    mask = torch.randn(5, 6, dtype=torch.float64)
    inputs = [query, key, value, *weights, *biases, out, out_bias, weight, *rows, mask]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def call(*t):
        bias_k, bias_v = t[12:14]
        return ops.routed_multihead_attention(
            *t[:9], *t[9:11], heads, chosen, t[11], bias_k, bias_v, True, None, t[14]
        )

    torch.autograd.gradcheck(call, inputs)


def test_heads_and_tokens_that_were_not_chosen_get_no_gradient():
    case = make(1, 6, dtype=torch.float64)
    weights, chosen = case[3], case[8]
    chosen[:] = False
    chosen[0, 2, 1] = chosen[0, 4, 1] = True
    for t in (*weights, case[9]):
        t.requires_grad_()
    grads = gradients(run(case), [*weights, case[9]])
    for grad in grads[:3]:
        rows = grad.abs().sum(1).unflatten(0, (4, 8)).sum(1)
        assert rows[1] > 0
        assert rows[[0, 2, 3]].eq(0).all()
    assert torch.equal(grads[3].ne(0), chosen)


def test_dropout_drops_the_same_in_forward_and_backward():
    case = make(2, 40, dtype=torch.float64)
    value = case[2].clone().requires_grad_()
    case = (*case[:2], value, *case[3:])
    options = {"dropout_p": 0.4, "dropout_seed": torch.tensor([7])}
    output = run(case, **options)
    assert not torch.equal(output, run(case))
    assert torch.equal(output, run(case, **options))
    # Linear in the values: the gradient gives the output again.
    (grad,) = torch.autograd.grad(output.sum(), value)
    without = run((*case[:2], torch.zeros_like(value), *case[3:]), **options)
    torch.testing.assert_close((grad * value).sum(), (output - without).sum())


def test_opcheck():
    case = make(2, 5, 6, 8, 2, 4)
    for t in (case[0], *case[3], case[9]):
        t.requires_grad_()
    query, key, value, weights, biases, out, out_bias, heads, chosen, weight = case
    opcheck(
        ops.routed_multihead_attention.default,
        (query, key, value, *weights, *biases, out, out_bias, heads, chosen, weight),
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({8: torch.zeros(2, 9, 4)}, TypeError, "chosen must be bool"),
        ({8: torch.zeros(2, 9, 3, dtype=torch.bool)}, ValueError, "chosen must"),
        ({8: torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "chosen must"),
        ({9: torch.zeros(2, 4)}, ValueError, "weight must"),
        ({9: torch.zeros(2, 9, 4).long()}, TypeError, "weight must be float"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, text):
    case = list(make())
    for place, value in change.items():
        case[place] = value
    with pytest.raises(error, match=text):
        run(case)


def test_saved_buffers_of_another_size_are_refused():
    case = make(2, 5, 6, 8, 2, 4)
    query, key, value, weights, biases, out, out_bias, heads, chosen, weight = case
    inputs = (query, key, value, *weights, *biases, out, out_bias, heads, chosen, weight,
              None, None, False, None, None, False, 0.0, None, None)  # fmt: skip
    output, *saved = ops._routed_multihead_attention_forward(*inputs)
    saved[1] = saved[1][:, :, :3]
    with pytest.raises(ValueError, match="k must have shape"):
        ops._routed_multihead_attention_backward(output, *inputs, *saved, [True] * 15)


def test_autocast():
    case = make(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(case)
    close(got, oracle(*case, {}), torch.bfloat16)
