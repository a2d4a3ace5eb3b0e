"""The attention operators against the oracle: outputs, gradients, masks, dropout, bad input."""
# ruff: noqa: E501  (the table of bad input reads best with one case per line)

import math

import headwise  # noqa: F401
import pytest
import torch
from support.attention_cases import *  # noqa: F403  (collected here)
from support.attention_cases import Random, dropped, layer_weights

ops = torch.ops.headwise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_dropout_mask_is_bernoulli():
    """With one-hot values the output shows the probabilities themselves."""
    length, p = 120, 0.3
    q, k = torch.zeros(2, 3, length, 4), torch.zeros(2, 3, length, 4)
    v = torch.eye(length).expand(2, 3, length, length)
    keep = dropped(q, k, v, p, 12345) * length  # 0 or 1 / (1 - p)
    values = keep.unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - p)]), rtol=1e-4, atol=1e-5)
    n = keep.numel()
    kept = (keep > 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    assert abs(keep.double().var() - p / (1 - p)) < 0.02
    for dim in range(4):  # neighbours in every direction are independent
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        assert abs(((a - 1 + p) * (b - 1 + p)).mean() / (p * (1 - p))) < 4 / math.sqrt(a.numel())
    assert torch.equal(keep, dropped(q, k, v, p, 12345) * length)
    other = (dropped(q, k, v, p, 12346) > 0).double()
    assert abs(((kept - 1 + p) * (other - 1 + p)).mean() / (p * (1 - p))) < 4 / math.sqrt(n)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_dropout_forward_and_backward_use_one_mask(p):
    """gradcheck compares with finite differences under a fixed seed."""
    rand = Random(12, torch.float64)
    x, weights = rand(2, 6, 4), layer_weights(rand, 2, 2, 4)
    index, count, weight = rand.selection(2, 2, count=[1, 2])
    padding = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]).bool()
    seed = torch.tensor([99])

    def run(x, wi, bi, wo, bo, weight):
        return ops.selected_self_attention(
            x, wi, bi, wo, bo, 2, index, count, weight, padding, None, False, p, seed
        )

    assert torch.autograd.gradcheck(run, (x, *weights, weight))


# --- bad input -------------------------------------------------------------------------------------


def good():
    rand = Random(1, torch.float32)
    x, (wi, bi, wo, bo) = rand(2, 5, 6), layer_weights(rand, 2, 3, 6)
    index, count, weight = rand.selection(2, 2, count=[1, 2])
    return {
        "x": x, "in_proj_weight": wi, "in_proj_bias": bi, "out_proj_weight": wo,
        "out_proj_bias": bo, "num_heads": 2, "index": index, "count": count, "weight": weight,
    }  # fmt: skip


BAD = [
    ({"x": torch.zeros(5, 6)}, ValueError, r"x must be \[B, L, D\], got shape \[5, 6\]"),
    ({"x": torch.zeros(2, 5, 6).int()}, TypeError, "x must be float64, float32, bfloat16 or float16"),
    ({"in_proj_weight": torch.zeros(18, 7)}, ValueError, r"in_proj_weight must be \[3E, D\] with size 6"),
    ({"in_proj_weight": torch.zeros(17, 6)}, ValueError, "in_proj_weight must have 3E rows"),
    ({"in_proj_weight": torch.zeros(18, 6).double()}, TypeError, "in_proj_weight must have the dtype of x"),
    ({"in_proj_bias": torch.zeros(17)}, ValueError, "in_proj_bias must be a vector with size 18"),
    ({"out_proj_weight": torch.zeros(6, 7)}, ValueError, r"out_proj_weight must be \[D, E\] with size 6"),
    ({"num_heads": 4}, ValueError, r"num_heads must divide the rows of in_proj_weight / 3 \(6\), got 4"),
    ({"num_heads": -1}, ValueError, "num_heads must be in 0..65536, got -1"),
    ({"index": torch.zeros(2, 3).int()}, ValueError, "index must have at most num_heads = 2 columns"),
    ({"index": torch.zeros(2, 2)}, TypeError, "index must be int32 or int64, got Float"),
    ({"index": torch.tensor([[2, -1], [0, 1]]).int()}, IndexError, "index must name heads between 0 and 1, got 2 for sequence 0"),
    ({"index": torch.tensor([[0, -1], [1, 1]]).int()}, ValueError, "index must be ascending without repeats, got 1 before 1 for sequence 1"),
    ({"count": torch.tensor([1.0, 2.0])}, TypeError, "count must be int32 or int64, got Float"),
    ({"count": torch.tensor([1, 3]).int()}, ValueError, "count must be between 0 and 2, got 3 for sequence 1"),
    ({"count": torch.tensor([-1, 1]).int()}, ValueError, "count must be between 0 and 2, got -1 for sequence 0"),
    ({"count": torch.tensor([1]).int()}, ValueError, r"count must be \[B\] with size 2"),
    ({"weight": torch.ones(2, 3)}, ValueError, r"weight must be \[B, H\] with size 2 in dimension 1"),
    ({"weight": torch.ones(2, 2).int()}, TypeError, "weight must be float64, float32"),
    ({"key_padding_mask": torch.zeros(2, 4).bool()}, ValueError, r"key_padding_mask must be \[B, S\] with size 5"),
    ({"key_padding_mask": torch.zeros(2, 5).int()}, TypeError, "key_padding_mask must be bool or floating, got Int"),
    ({"attn_mask": torch.zeros(4, 5)}, ValueError, r"attn_mask must be broadcastable to \[B, H, L, S\] = \[2, 2, 5, 5\], got shape \[4, 5\]"),
    ({"attn_mask": torch.zeros(5, 5).long()}, TypeError, "attn_mask must be bool or floating, got Long"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    ({"dropout_p": 0.5}, ValueError, "dropout_seed must be given when dropout_p > 0"),
    ({"dropout_p": 0.5, "dropout_seed": torch.zeros(1)}, TypeError, "dropout_seed must be int64, got Float"),
    ({"weight": torch.ones(2, 2, device="meta")}, RuntimeError, r"weight must be on the device of x \(cpu\), got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_bad_input_gets_one_sentence(change, error, text):
    for arguments in ({**good(), **change}, {k: v for k, v in {**good(), **change}.items()}):
        with pytest.raises(error, match=text) as raised:
            ops.selected_self_attention(**arguments)
        assert "Exception raised from" not in str(raised.value)


def test_bad_input_of_the_other_forms():
    q, k = torch.zeros(1, 4, 5, 3), torch.zeros(1, 3, 5, 3)
    index, count = torch.zeros(1, 4).int(), torch.ones(1).int()
    with pytest.raises(
        ValueError, match=r"heads of k and v must divide the heads of q \(4\), got 3"
    ):
        ops.selected_attention(q, k, k, index, count)
    with pytest.raises(ValueError, match=r"v must be \[B, Hkv, S, dv\] with size 5 in dimension 2"):
        ops.selected_attention(q, q, q[:, :, :4], index, count)
    x, w, b = torch.zeros(1, 5, 4), torch.zeros(4, 4), torch.zeros(4)
    with pytest.raises(
        ValueError, match="bias_k and bias_v must be given together, got only bias_k"
    ):
        ops.selected_multihead_attention(
            x, x, x, w, w, w, b, b, b, w, b, 2, index[:, :2], count, torch.ones(1, 2), b
        )
