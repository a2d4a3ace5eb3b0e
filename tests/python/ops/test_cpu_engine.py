"""The CPU engine: any shape on the packed kernels, any number of threads, gradients of masks."""

from __future__ import annotations

import os
import subprocess
import sys

import headwise as hw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.attention_cases import MASKS, Random, check, core_reference, layer_weights, leaf, masks

ops = torch.ops.headwise


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_any_shape_on_the_packed_kernels(data):
    """Lengths around the tiles' sizes, widths that the packed kernels take, every kind of mask."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 15, 63, 64, 65, 129]))
    width, d = 8 * draw(st.integers(1, 3)), 8 * draw(st.integers(1, 2))
    num_heads = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rand = Random(draw(st.integers(0, 2**20)), dtype)
    x = rand(batch, length, width)
    weights = layer_weights(rand, num_heads, d, width, bias=draw(st.booleans()))
    index, count, weight = rand.selection(batch, num_heads)
    options = masks(rand, draw(st.sampled_from(MASKS)), batch, num_heads, length, length)
    if draw(st.booleans()):
        options["scale"] = 0.3
    leaves = [t for t in (x, *weights, weight, *options.values()) if leaf(t)]
    check(
        ops.selected_self_attention, oracle.self_attention, leaves, dtype,
        x, *weights, num_heads, index, count, weight, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_short_sequences(dtype, batch, length):
    """Few rows read the weights unpacked; short sequences are multiplied together."""
    rand = Random(6, dtype)
    x, weights = rand(batch, length, 40), layer_weights(rand, 3, 16, 40)
    index, count, weight = rand.selection(batch, 3)
    padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))
    check(
        ops.selected_self_attention, oracle.self_attention, [x, *weights, weight], dtype,
        x, *weights, 3, index, count, weight, key_padding_mask=padding,
    )  # fmt: skip
    heads, kinds = rand.selection(batch, 3, count=2), (rand(batch, length, 16), rand(batch, 7, 24))
    general = (rand(48, 16), rand(48, 24), rand(48, 24), rand(48), None, rand(48))
    out, extra = (rand(8, 48), None), (rand(48), rand(48))
    leaves = [t for t in (*kinds, *general, *out, *extra, heads[2]) if t is not None]
    check(
        ops.selected_multihead_attention, oracle.multihead_attention, leaves, dtype,
        kinds[0], kinds[1], kinds[1], *general, *out, 3, *heads, *extra, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [(3, 4, 70, 70), (3, 1, 70, 70), (1, 4, 70, 70), (70, 70), (4, 70, 70), (3, 1, 1, 70), (70, 1),
     (1,), (3, 4, 1, 1)],
    ids=str,
)  # fmt: skip
def test_gradient_of_a_mask_has_its_shape(dtype, sizes):
    """However a mask is broadcast, its gradient is summed over what it is broadcast to."""
    if sizes == (1,) and dtype == torch.bfloat16:
        pytest.skip("softmax does not see a shift: only rounding is left of this sum")
    rand = Random(1, dtype)
    mask = rand(*sizes)
    x, weights = rand(3, 70, 16), layer_weights(rand, 4, 8, 16)
    index, count, weight = rand.selection(3, 4, count=[4, 2, 3])
    check(
        ops.selected_self_attention, oracle.self_attention, [x, *weights, weight, mask], dtype,
        x, *weights, 4, index, count, weight, attn_mask=mask,
    )  # fmt: skip
    q, k, v = rand(3, 4, 70, 8), rand(3, 2, 70, 8), rand(3, 2, 70, 8)
    check(
        ops.selected_attention, core_reference, [q, k, v, weight, mask], dtype,
        q, k, v, index, count, weight, attn_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 70), (5, 70), (3, 1), (11, 9)])
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype, batch, length, masked):
    """Work is divided by rows, heads and columns; sums keep their order."""

    def run(number):
        threads(number)
        rand = Random(3, dtype)
        x, weights = rand(batch, length, 136), layer_weights(rand, 4, 8, 136)
        index, count, weight = rand.selection(batch, 4, count=3)
        bias = rand(length, length) if masked else None
        leaves = [x, *weights, weight] + [bias] * masked
        y = ops.selected_self_attention(x, *weights, 4, index, count, weight, attn_mask=bias)
        upstream = rand(*y.shape).detach()
        gradients = torch.autograd.grad(y, leaves, upstream)
        with torch.no_grad():
            alone = ops.selected_self_attention(
                x, *weights, 4, index, count, weight, attn_mask=bias
            )
        return [y, alone, *gradients]

    alone = run(1)
    for number in (2, 3, 7):
        for a, b in zip(alone, run(number), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_core_on_the_packed_kernels(dtype, kind):
    """Grouped key/value heads and a value width of its own, several tiles of keys."""
    rand = Random(9, dtype)
    q, k = rand(2, 6, 67, 8), rand(2, 2, 150, 8)
    v = rand(2, 150, 2, 16)
    index, count, weight = rand.selection(2, 6, count=[3, 5])
    options = masks(rand, kind, 2, 6, 67, 150)
    leaves = [q, k, v, weight] + [m for m in options.values() if leaf(m)]
    check(
        ops.selected_attention, core_reference, leaves, dtype,
        q, k, v.transpose(1, 2), index, count, weight, **options,
    )  # fmt: skip


ELSEWHERE = """
import headwise as hw, torch
from support import oracle
from support.attention_cases import Random, check, layer_weights
reasons = [b.reason for b in hw.backends() if b.name == "cpu_packed"]
assert reasons[0].endswith((": float32 only on this processor", " does not run here")), reasons
for dtype in (torch.float32, torch.bfloat16):
    rand = Random(2, dtype)
    x, weights = rand(2, 70, 16), layer_weights(rand, 4, 8, 16)
    index, count, weight = rand.selection(2, 4, count=[3, 1])
    check(
        torch.ops.headwise.selected_self_attention, oracle.self_attention, [x, *weights, weight],
        dtype, x, *weights, 4, index, count, weight,
    )
"""


def test_a_processor_without_bfloat16():
    """The general kernels are used where brgemm cannot, and backends() reports it."""
    names = [backend.name for backend in hw.backends() if backend.device == "cpu"]
    assert names == ["cpu_packed", "cpu_kernels"]
    environment = {
        **os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(3, 20), (20, 3), (70, 200), (200, 70)])
def test_queries_and_keys_that_begin_at_one_place(dtype, queries, keys):
    """The first tokens attend to all, and all to the first: views of one tensor."""
    rand = Random(8, dtype)
    x = rand(1, max(queries, keys), 16)
    weights = [rand(32, 16) for _ in range(3)] + [rand(32) for _ in range(3)]
    out = (rand(16, 32), rand(16))
    selection = rand.selection(1, 4, count=3)
    q, k = x[:, :queries], x[:, :keys]
    check(
        ops.selected_multihead_attention, oracle.multihead_attention,
        [x, *weights, *out, selection[2]], dtype,
        q, k, k, *weights, *out, 4, *selection, None, None, False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strides_beyond_32_bits(dtype):
    """A stride that no step takes may be any number; BLAS takes 32-bit ones."""
    rand = Random(8, dtype)
    q, k, v = (rand(1, 2, 1, 8) for _ in range(3))
    far = [x.as_strided((1, 2, 1, 8), (16, 8, 2**33 + 1, 1)) for x in (q, k, v)]
    index, count, weight = rand.selection(1, 2, count=1)
    check(
        ops.selected_attention, core_reference, [q, k, v, weight], dtype,
        *far, index, count, weight,
    )  # fmt: skip


THREADS = """
import os, headwise, torch
from support.attention_cases import Random, layer_weights
torch.set_num_threads(2)
rand = Random(2, torch.float32)
x, weights = rand(8, 16, 16), layer_weights(rand, 4, 8, 16)
selection = rand.selection(8, 4, count=3)
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    torch.ops.headwise.selected_self_attention(x, *weights, 4, *selection)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads of a process")
def test_the_engine_starts_threads():
    """LibTorch's parallel loop is a template: compiled without OpenMP, it would run on one."""
    if any("compiled without OpenMP" in backend.reason for backend in hw.backends()):
        pytest.skip("compiled without OpenMP")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_sums_are_rounded_as_torch_rounds_them():
    """Ties, infinities, NaN and large numbers; a bias is added before rounding."""
    torch.manual_seed(0)
    heads, width, rows = 3, 40, 64  # 40: a vector of 16 lanes is not filled
    bits = torch.randint(-(2**15), 2**15, (1, rows, heads * width), dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    x[(x.abs() < 1e-30) & (x != 0)] = 1.0  # subnormal numbers may become zeros
    x[x.isfinite() & (x.abs() > 1e37)] = 1e37  # the sums of finite rows are finite
    bias = torch.randn(heads * width).bfloat16() * x[0, 0].nan_to_num(1.0, 1.0, 1.0)
    index, count = torch.arange(heads).int()[None], torch.tensor([heads]).int()
    finite = torch.where(x.isfinite(), x, 0.5)
    one = torch.eye(heads * width).bfloat16()
    found = ops.selected_projection(finite, one, bias, heads, index, count)
    expected = (finite.float() + bias.float()).bfloat16().unflatten(2, (heads, width))
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=0)
    # An infinity or NaN reaches the sums of its own row.
    special = ops.selected_projection(x, one, bias, heads, index, count)
    same = x.isfinite().all(2)
    assert torch.equal(special.transpose(1, 2).isfinite().all((2, 3)), same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 70, 130])
@pytest.mark.parametrize("kind", ["none", "ragged"])
def test_gradients_of_rows_that_are_part_of_a_wider_tensor(dtype, length, kind):
    """Backward multiplies floats where they lie: rows may be further apart than they are long."""
    rand = Random(9, dtype)
    wide = rand(3, length, 40)
    weights = layer_weights(rand, 4, 8, 16)
    index, count, weight = rand.selection(3, 4)
    options = masks(rand, kind, 3, 4, length, length)
    check(
        lambda x, *rest, **named: ops.selected_self_attention(x[..., 8:24], *rest, **named),
        lambda x, *rest, **named: oracle.self_attention(x[..., 8:24], *rest, **named),
        [wide, *weights, weight], dtype, wide, *weights, 4, index, count, weight, **options,
    )  # fmt: skip


@pytest.mark.parametrize("length", [0, 5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_written_in_full(dtype, length):
    """Also of heads that no sequence chose and sequences without a head: memory held NaN before."""
    batch, heads, width = 3, 4, 64
    x = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(3 * width, width) / 8).to(dtype).requires_grad_()
    out = (torch.randn(width, width) / 8).to(dtype).requires_grad_()
    index = torch.tensor([[1, -1, -1, -1], [1, 3, -1, -1], [-1] * 4]).int()
    count = torch.tensor([1, 2, 0]).int()
    y = ops.selected_self_attention(
        x, weight, None, out, None, heads, index, count, torch.ones(batch, heads, dtype=dtype)
    )
    for read in (x, weight, out):
        for _ in range(8):
            torch.full_like(read, torch.nan)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, out))
    for grad in grads:
        assert grad.isfinite().all()
    by_head = grads[1].view(3, heads, -1, width), grads[2].view(width, heads, -1)
    for unused in (0, 2):
        assert not by_head[0][:, unused].any() and not by_head[1][:, unused].any()
    assert not grads[0][2].any()
    if length:
        assert by_head[0][:, [1, 3]].abs().amax((0, 2, 3)).gt(0).all()
        assert by_head[1][:, [1, 3]].abs().amax((0, 2)).gt(0).all()
