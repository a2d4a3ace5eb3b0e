"""attention_statistics and attention_entropy against the plain formula in float64."""

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch
import torch.nn.functional as F
from support.attention_statistics import DTYPES, KINDS, SHAPES, masks, plain

ops = torch.ops.headwise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_equals_the_plain_formula(kind, shape, dtype, tolerance):
    B, H, Hkv, L, S, d = shape
    q, k = torch.randn(B, H, L, d, dtype=dtype) * 2, torch.randn(B, Hkv, S, d, dtype=dtype)
    arguments = masks(kind, B, H, L, S)
    got = ops.attention_statistics(q, k, **arguments)
    for value, expected in zip(got, plain(q, k, **arguments), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ops.attention_entropy(q, k, **arguments), got[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_accumulated_in_float32(dtype):
    q, k = torch.randn(2, 3, 65, 32).to(dtype), torch.randn(2, 3, 300, 32).to(dtype)
    arguments = {"attn_mask": torch.randn(65, 300).to(dtype), "is_causal": True}
    for value, expected in zip(
        ops.attention_statistics(q, k, **arguments), plain(q, k, **arguments), strict=True
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)


def test_non_contiguous_inputs():
    qkv = torch.randn(2, 50, 3, 4, 16)  # [B, L, 3, H, d], as one projection leaves it
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    expected = plain(q, k)
    for value, e in zip(ops.attention_statistics(q, k), expected, strict=True):
        torch.testing.assert_close(value.double(), e, rtol=2e-5, atol=2e-5)
    reversed_width = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(
        ops.attention_entropy(reversed_width, k).double(), expected[0], rtol=2e-5, atol=2e-5
    )


def test_limits():
    """Equal scores: entropy 1. One dominant score: entropy 0, confidence 1, however large."""
    k = F.normalize(torch.randn(1, 2, 40, 8), dim=-1)  # so that no other key comes near its own
    entropy, confidence = ops.attention_statistics(torch.zeros(1, 2, 7, 8), k)
    torch.testing.assert_close(entropy, torch.ones(1, 2))
    torch.testing.assert_close(confidence, torch.full((1, 2), 1 / 40))
    entropy, confidence = ops.attention_statistics(k * 1e4, k)
    assert (entropy >= 0).all() and (entropy < 1e-3).all() and (confidence <= 1).all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8)]
)
def test_empty(shape):
    B, H, L, S, d = shape
    for value in ops.attention_statistics(torch.randn(B, H, L, d), torch.randn(B, H, S, d)):
        assert torch.equal(value, torch.zeros(B, H))


def test_nan_is_reported_not_hidden():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    q[0, 0, 1, 2] = float("nan")
    entropy, confidence = ops.attention_statistics(q, k)
    assert entropy.isnan().tolist() == confidence.isnan().tolist() == [[True, False]]


q0, k0 = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
BAD = [
    ((q0[0], k0), {}, ValueError, r"q must have shape \[B, H, L, d\]"),
    ((q0, torch.zeros(2, 3, 5, 8)), {}, ValueError, r"must divide the heads of q \(4\), got 3"),
    ((q0, k0.double()), {}, TypeError, "k must have the dtype of q"),
    ((q0.int(), k0.int()), {}, TypeError, "q must be a floating-point"),
    (
        (q0, k0),
        {"key_padding_mask": torch.zeros(2, 4)},
        ValueError,
        r"key_padding_mask .* \[2, 5\]",
    ),
    ((q0, k0), {"query_padding_mask": torch.zeros(2, 3)}, TypeError, "must be boolean, got Float"),
    ((q0, k0), {"attn_mask": torch.zeros(3, 4)}, ValueError, "attn_mask must be broadcastable to"),
]


@pytest.mark.parametrize("tensors, arguments, error, text", BAD)
def test_refuses(tensors, arguments, error, text):
    with pytest.raises(error, match=text):
        ops.attention_statistics(*tensors, **arguments)


def test_backward_says_that_there_is_no_derivative():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="attention_statistics.*not implemented"):
        ops.attention_entropy(q, q.detach()).sum().backward()


def test_opcheck_and_compile():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 7, 8)
    arguments = {"key_padding_mask": torch.rand(2, 7) < 0.3, "is_causal": True}
    torch.library.opcheck(ops.attention_statistics.default, (q, k), arguments)
    torch.library.opcheck(ops.attention_entropy.default, (q, k), arguments)
    compiled = torch.compile(
        ops.attention_entropy, fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert torch.equal(compiled(q, k, **arguments), ops.attention_entropy(q, k, **arguments))
