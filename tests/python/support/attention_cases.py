"""Cases of the attention operators against the oracle, for whatever executes them.

A test module imports the cases that it runs, and puts the operators to run in place of ``ops``.
"""

import math

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import oracle

ops = torch.ops.headwise


# Largest error over the largest value of the reference. The low precisions round the inputs of
# every product once and accumulate in float32; the oracle runs in float64 on the same inputs.
FORWARD = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
BACKWARD = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.bfloat16: 6e-2,  # 4.4e-2 was seen, in the bias of the keys, whose sum cancels
    torch.float16: 1e-2,  # 6.4e-3 was seen, in the gradient of x
}


def largest(x):
    return x.abs().max().item() if x is not None and x.numel() else 0.0


def close(actual, expected, tolerance, scale=0.0):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = largest(actual.double() - expected.double()) / max(largest(expected), scale, 1e-30)
    assert error <= tolerance, f"error {error:.2e} above {tolerance:.0e}"


class Random:
    """Leaf tensors of one dtype that require gradients."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape, scale=0.4):
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return x.to(self.dtype).requires_grad_()

    def selection(self, batch, num_heads, **arguments):
        arguments.setdefault("dtype", self.dtype)
        index, count, weight = oracle.random_selection(
            batch, num_heads, self.generator, **arguments
        )
        return index, count, weight.requires_grad_()


def check(operator, reference, leaves, dtype, *arguments, **options):
    """Output without and with autograd, and the gradient of every leaf."""

    def doubled(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    with torch.no_grad():
        inference = operator(*arguments, **options)
    y = operator(*arguments, **options)
    expected = reference(
        *[doubled(x) for x in arguments], **{k: doubled(x) for k, x in options.items()}
    )
    assert y.dtype == dtype
    close(inference, expected, FORWARD[dtype])
    close(y, expected, FORWARD[dtype])
    if not expected.requires_grad:  # no head and no bias: a constant
        return y, ()
    upstream = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    want = torch.autograd.grad(expected, leaves, upstream.double(), allow_unused=True)
    # The gradient of the key bias is a sum that cancels (softmax does not see a shift): errors are
    # compared with the other gradients, too.
    scale = 0.1 * max(map(largest, want), default=0.0)
    for leaf, a, b in zip(leaves, got, want, strict=True):
        assert a is not None and a.dtype == leaf.dtype
        close(a, torch.zeros_like(leaf) if b is None else b, BACKWARD[dtype], scale)
    return y, got


def layer_weights(rand, num_heads, d, width, bias=True):
    e = num_heads * d
    return (
        rand(3 * e, width),
        rand(3 * e) if bias else None,
        rand(width, e),
        rand(width) if bias else None,
    )


def masks(rand, kind, batch, num_heads, queries, keys):
    """One of the masks that users pass, and the leaves among them."""
    ragged = torch.arange(keys) >= torch.randint(1, keys + 1, (batch, 1))
    scattered = torch.rand(batch, keys) < 0.3
    hidden = torch.rand(queries, keys) < 0.3
    additive = rand(batch, 1, queries, keys)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "ragged": {"key_padding_mask": ragged},
        "scattered": {"key_padding_mask": scattered},
        "float padding": {
            "key_padding_mask": torch.zeros(batch, keys).masked_fill(ragged, -math.inf)
        },
        "padding bias": {"key_padding_mask": rand(batch, keys)},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": additive},
        "per head": {"attn_mask": torch.rand(batch, num_heads, queries, keys) < 0.4},
        "all at once": {"key_padding_mask": scattered, "attn_mask": additive, "is_causal": True},
        "all hidden": {"key_padding_mask": torch.ones(batch, keys, dtype=torch.bool)},
    }[kind]


MASKS = [
    "none",
    "causal",
    "ragged",
    "scattered",
    "float padding",
    "padding bias",
    "bool",
    "float",
    "per head",
    "all at once",
    "all hidden",
]


# Widths that the packed kernels take, and widths that they leave to the general ones.
@pytest.mark.parametrize(("width", "d"), [(24, 16), (20, 5)])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", FORWARD)
def test_self_attention(dtype, kind, width, d):
    rand = Random(7, dtype)
    batch, length, num_heads = 3, 137, 4
    x, weights = rand(batch, length, width, scale=1.0), layer_weights(rand, num_heads, d, width)
    index, count, weight = rand.selection(batch, num_heads, count=[3, 1, 4])
    options = masks(rand, kind, batch, num_heads, length, length)
    leaves = [x, *weights, weight] + [m for m in options.values() if leaf(m)]
    check(
        ops.selected_self_attention, oracle.self_attention, leaves, dtype,
        x, *weights, num_heads, index, count, weight, **options,
    )  # fmt: skip


def leaf(x):
    return torch.is_tensor(x) and x.requires_grad


@pytest.mark.parametrize("widths", [(4, 10, 6, 7, 9), (8, 16, 8, 24, 8)])
@pytest.mark.parametrize("kind", ["none", "scattered", "all at once", "all hidden"])
@pytest.mark.parametrize("added", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_multihead_attention(dtype, added, kind, widths):
    rand = Random(8, dtype)
    batch, queries, keys, num_heads = 2, 67, 13, 3
    d, *widths = widths
    e = num_heads * d
    inputs = (
        rand(batch, queries, widths[0]),
        rand(batch, keys, widths[1]),
        rand(batch, keys, widths[2]),
    )
    weights = (
        *(rand(e, n) for n in widths[:3]),
        rand(e),
        rand(e),
        rand(e),
        rand(widths[3], e),
        rand(widths[3]),
    )
    extra = (rand(e), rand(e)) if added[0] else (None, None)
    index, count, weight = rand.selection(batch, num_heads, count=[2, 3])
    options = masks(rand, kind, batch, num_heads, queries, keys)
    leaves = [x for x in (*inputs, *weights, *extra, weight, *options.values()) if leaf(x)]
    check(
        ops.selected_multihead_attention, oracle.multihead_attention, leaves, dtype,
        *inputs, *weights, num_heads, index, count, weight, *extra, added[1], **options,
    )  # fmt: skip


def core_reference(q, k, v, index, count, weight=None, **options):
    weight = torch.ones(q.shape[:2], dtype=q.dtype) if weight is None else weight
    scale = oracle.dense_weight(index, count, weight)[:, :, None, None]
    return oracle.attention(q, k, v, **options) * scale


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FORWARD)
def test_core_attention(dtype, weighted, kind):
    """Grouped key/value heads, a value width of its own, and inputs that are views."""
    rand = Random(9, dtype)
    batch, num_heads, kv_heads, queries, keys, d, dv = 2, 6, 2, 67, 21, 4, 7
    q = rand(batch, queries, num_heads, d)
    k, v = rand(batch, keys, kv_heads, d), rand(batch, kv_heads, dv, keys)
    index, count, weight = rand.selection(batch, num_heads, count=[3, 5])
    options = masks(rand, kind, batch, num_heads, queries, keys)
    leaves = [q, k, v] + [weight] * weighted + [m for m in options.values() if leaf(m)]
    check(
        ops.selected_attention, core_reference, leaves, dtype,
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3), index, count,
        weight if weighted else None, **options,
    )  # fmt: skip


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_random_shapes(data):
    """Any shape, selection and mask that is allowed."""
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, length, width = integers(0, 3), integers(0, 9), integers(1, 6)
    num_heads, d = integers(0, 4), integers(1, 4)
    torch.manual_seed(integers(0, 2**20))
    rand = Random(integers(0, 2**20), torch.float64)
    kind = data.draw(st.sampled_from(MASKS if length else ["none", "causal", "float"]))
    if length == 0:
        kind = "none"
    x = rand(batch, length, width)
    weights = layer_weights(rand, num_heads, d, width, bias=data.draw(st.booleans()))
    index, count, weight = rand.selection(batch, num_heads)
    columns = max(int(count.max()) if batch else 0, integers(0, num_heads))
    options = masks(rand, kind, batch, num_heads, length, length) if length else {}
    options["scale"] = data.draw(st.sampled_from([None, 0.3]))
    leaves = [t for t in (x, *weights, weight, *options.values()) if leaf(t)]
    check(
        ops.selected_self_attention, oracle.self_attention, leaves, torch.float64,
        x, *weights, num_heads, index[:, :columns], count, weight, **options,
    )  # fmt: skip


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("batch", [0, 2])
def test_tiny_sizes(batch, length):
    rand = Random(3, torch.float64)
    x, weights = rand(batch, length, 6), layer_weights(rand, 2, 3, 6)
    index, count, weight = rand.selection(batch, 2, count=1)
    leaves = [x, *weights, weight]
    check(
        ops.selected_self_attention, oracle.self_attention, leaves, torch.float64,
        x, *weights, 2, index, count, weight,
    )  # fmt: skip
    q, k, v = rand(batch, 2, 3, 4), rand(batch, 1, length, 4), rand(batch, 1, length, 5)
    check(ops.selected_attention, core_reference, [q, k, v], torch.float64, q, k, v, index, count)


@pytest.mark.parametrize("kind", ["none", "causal", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_layer_takes_several_tiles(dtype, kind):
    rand = Random(14, dtype)
    x, weights = rand(1, 1031, 16, scale=1.0), layer_weights(rand, 2, 8, 16)
    index, count, weight = rand.selection(1, 2, count=2)
    options = masks(rand, kind, 1, 2, 1031, 1031)
    check(
        ops.selected_self_attention, oracle.self_attention, [x, *weights, weight], dtype,
        x, *weights, 2, index, count, weight, **options,
    )  # fmt: skip


def test_long_keys_take_several_tiles():
    """More keys than one tile holds: the running maximum is rescaled between tiles."""
    rand = Random(4, torch.float64)
    q, k, v = rand(1, 2, 65, 3, scale=2.0), rand(1, 2, 1100, 3, scale=2.0), rand(1, 2, 1100, 3)
    index, count, weight = rand.selection(1, 2, count=2)
    check(ops.selected_attention, core_reference, [q, k, v, weight], torch.float64,
          q, k, v, index, count, weight)  # fmt: skip


def test_no_heads_give_the_output_bias():
    rand = Random(5, torch.float32)
    x, (wi, bi, wo, bo) = rand(2, 4, 6), layer_weights(rand, 2, 3, 6)
    index = torch.full((2, 2), -1, dtype=torch.int32)
    count, weight = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 2)
    y = ops.selected_self_attention(x, wi, bi, wo, bo, 2, index, count, weight)
    assert torch.equal(y, bo.expand(2, 4, 6))
    y.sum().backward()
    for t in (x, wi, bi, wo):
        assert torch.equal(t.grad, torch.zeros_like(t))
    assert torch.equal(bo.grad, torch.full_like(bo, 8))


def test_heads_never_chosen_get_exactly_no_gradient():
    rand = Random(6, torch.float32)
    x, (wi, bi, wo, bo) = rand(3, 9, 8), layer_weights(rand, 4, 2, 8)
    index = torch.tensor([[0, 2, -1, -1], [2, -1, -1, -1], [0, -1, -1, -1]], dtype=torch.int32)
    count = torch.tensor([2, 1, 1], dtype=torch.int32)
    weight = torch.ones(3, 4, requires_grad=True)
    ops.selected_self_attention(
        x, wi, bi, wo, bo, 4, index, count, weight
    ).square().sum().backward()
    rows = wi.grad.view(3, 4, 2, 8)
    assert (rows[:, [1, 3]] == 0).all() and (rows[:, [0, 2]] != 0).any()
    assert (wo.grad.view(8, 4, 2)[:, [1, 3]] == 0).all()
    assert (
        (weight.grad != 0) == torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]).bool()
    ).all()


def test_what_was_not_chosen_is_not_read():
    """NaN in the weights of a head that no sequence chose has no effect."""
    rand = Random(6, torch.float32)
    x, (wi, bi, wo, bo) = rand(2, 9, 8), layer_weights(rand, 4, 2, 8)
    with torch.no_grad():
        wi.view(3, 4, 2, 8)[:, 1] = math.nan
        wo.view(8, 4, 2)[:, 1] = math.inf
    index = torch.tensor([[0, 2, 3]] * 2, dtype=torch.int32)
    count, weight = torch.tensor([3, 2], dtype=torch.int32), torch.ones(2, 4)
    y = ops.selected_self_attention(x, wi, bi, wo, bo, 4, index, count, weight)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all() and torch.isfinite(gradient).all()


def test_infinite_and_nan_inputs_reach_what_they_reach_in_torch():
    rand = Random(2, torch.float32)
    q, k, v = rand(2, 2, 5, 4), rand(2, 2, 5, 4), rand(2, 2, 5, 4)
    with torch.no_grad():
        q[0, 0, 1] = math.nan
        v[1, 1, 0] = math.inf
    index, count = torch.tensor([[0, 1]] * 2).int(), torch.full((2,), 2).int()
    y = ops.selected_attention(q, k, v, index, count)
    expected = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))


def test_weight_may_have_another_dtype():
    rand = Random(1, torch.bfloat16)
    x, weights = rand(2, 5, 6), layer_weights(rand, 2, 3, 6)
    index, count, weight = rand.selection(2, 2, count=2, dtype=torch.float32)
    y = ops.selected_self_attention(x, *weights, 2, index, count, weight)
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32


def test_non_contiguous_inputs():
    rand = Random(11, torch.float64)
    length_first = rand(7, 2, 6)
    weights = layer_weights(rand, 2, 3, 6)
    wi_t = rand(6, 18)
    index, count, weight = rand.selection(2, 2, count=1)
    check(
        ops.selected_self_attention, oracle.self_attention, [length_first, wi_t, weight],
        torch.float64,
        length_first.transpose(0, 1), wi_t.t(), *weights[1:], 2, index, count, weight,
        attn_mask=(torch.rand(14, 14) < 0.2)[::2, ::2],
    )  # fmt: skip


def dropped(q, k, v, p, seed, **options):
    batch, num_heads = q.shape[:2]
    index = torch.arange(num_heads).expand(batch, num_heads).int()
    count = torch.full((batch,), num_heads).int()
    return ops.selected_attention(
        q, k, v, index, count, dropout_p=p, dropout_seed=torch.tensor([seed]), **options
    )


@pytest.mark.parametrize("dtype", FORWARD)
def test_dropout_does_not_depend_on_padding_or_selection(dtype):
    """The mask of an element is a function of the seed and its place alone."""
    rand = Random(13, dtype)
    x, weights = rand(2, 6, 8), layer_weights(rand, 2, 8, 8)
    keys = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    zeros = torch.zeros(2, 2, 6, 3, dtype=torch.float64)
    keep = dropped(zeros, zeros, keys, 0.5, 7) * 6  # [B, H, L, S]
    index, count, weight = rand.selection(2, 2, count=[1, 2])
    options = {"key_padding_mask": torch.arange(6) >= torch.tensor([[4], [6]])}
    arguments = (x, *weights, 2, index, count, weight)
    y = ops.selected_self_attention(
        *arguments, **options, dropout_p=0.5, dropout_seed=torch.tensor([7])
    )
    expected = oracle.self_attention(
        *[t.double() if leaf(t) else t for t in arguments], **options, keep=keep
    )
    close(y, expected, FORWARD[dtype])


#: The cases, for a module that imports them all.
__all__ = [name for name in dir() if name.startswith("test_")]
