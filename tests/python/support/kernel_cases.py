"""Cases of the CUDA kernels against the oracle, on an emulated device or a real one.

Tiles, widths, addresses and choices that only these kernels have. A test module imports the cases
that it runs, and puts the operators to run in place of ``attention_cases.ops``.
"""

import pytest
import torch

from support import attention_cases as cases
from support import oracle
from support.emulator import EMULATED

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TENSOR_CORES = [torch.bfloat16, torch.float16]


def layer_case(dtype, batch, length, width, num_heads, d, kind, count, scale=1.0):
    rand = cases.Random(7, dtype)
    x = rand(batch, length, width, scale=scale)
    weights = cases.layer_weights(rand, num_heads, d, width)
    index, count, weight = rand.selection(batch, num_heads, count=count)
    options = cases.masks(rand, kind, batch, num_heads, length, length)
    leaves = [x, *weights, weight] + [m for m in options.values() if cases.leaf(m)]
    cases.check(
        cases.ops.selected_self_attention, oracle.self_attention, leaves, dtype,
        x, *weights, num_heads, index, count, weight, **options,
    )  # fmt: skip
    if EMULATED and cases.ops is EMULATED:  # what evaluation runs keeps nothing for a backward
        inputs = (x, *weights, num_heads, index, count, weight)
        order = ("key_padding_mask", "attn_mask", "is_causal")
        rest = [options.get(name) for name in order[:2]] + [options.get("is_causal", False)]
        with torch.no_grad():
            expected = EMULATED.selected_self_attention(*inputs, **options)
            y = torch.ops.headwise_emulated.self_attention(*inputs, *rest, 0.0, None, None)
        assert torch.equal(y, expected)


# Every tile of the attention kernels, rows that cannot be copied 16 bytes at a time, heads that
# only the plain kernels take, columns that fill several tiles.
@pytest.mark.parametrize(
    ("width", "heads", "d"), [(40, 3, 32), (20, 2, 5), (136, 2, 72), (16, 1, 136), (8, 5, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *TENSOR_CORES], ids=str)
def test_widths(dtype, width, heads, d):
    # Smaller inputs for wider heads: large scores would turn rounding into errors of the softmax.
    layer_case(dtype, 2, 21, width, heads, d, "ragged", [1, heads], scale=0.3)


class Shifted:
    """Operators whose floating inputs begin one element behind an address that is aligned."""

    def __init__(self, operators):
        self.operators = operators

    def __getattr__(self, name):
        def shift(x):
            if not torch.is_tensor(x) or not x.is_floating_point() or x.numel() == 0:
                return x
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

        def call(*arguments, **options):
            options = {key: shift(x) for key, x in options.items()}
            return getattr(self.operators, name)(*map(shift, arguments), **options)

        return call


@pytest.mark.parametrize(
    "way", [("kernels", "warps"), ("flash", "warps"), ("kernels", "warpgroups")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_at_odd_addresses(dtype, way, monkeypatch, cuda_routes):
    """Nothing is read 16 bytes at a time if its address does not allow it."""
    cuda_routes(*way)
    # On a GPU inputs travel there first.
    inner = getattr(cases.ops, "operators", None)
    shifted = Shifted(cases.ops) if inner is None else type(cases.ops)(Shifted(inner))
    monkeypatch.setattr(cases, "ops", shifted)
    layer_case(dtype, 2, 37, 24, 3, 16, "ragged", [3, 2], scale=0.3)
    rand = cases.Random(4, dtype)
    index, count, weight = rand.selection(2, 4, count=[1, 3])
    for queries in (1, 20):
        q, k, v = rand(2, 4, queries, 16), rand(2, 2, 20, 16), rand(2, 2, 20, 16)
        cases.check(cases.ops.selected_attention, cases.core_reference, [q, k, v, weight], dtype,
                    q, k, v, index, count, weight)  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "causal", "ragged"])
def test_several_tiles_of_rows(kind):
    layer_case(torch.bfloat16, 1, 150, 16, 2, 8, kind, [2])


@pytest.mark.parametrize("d", [32, 64, 128])
def test_core_widths(d):
    rand = cases.Random(3, torch.bfloat16)
    q, k, v = rand(2, 4, 20, d), rand(2, 2, 90, d), rand(2, 2, 90, d)
    index, count, weight = rand.selection(2, 4, count=[2, 3])
    cases.check(cases.ops.selected_attention, cases.core_reference, [q, k, v, weight],
                torch.bfloat16, q, k, v, index, count, weight)  # fmt: skip


def test_an_index_with_few_columns_and_one_that_is_out_of_range():
    """Wrong values are clamped, since reporting them would wait for the device."""
    rand = cases.Random(1, torch.float64)
    x, weights = rand(2, 5, 6), cases.layer_weights(rand, 4, 2, 6)
    index = torch.tensor([[1, 3], [0, -1]], dtype=torch.int32)
    count, weight = torch.tensor([2, 1], dtype=torch.int32), rand(2, 4)
    good = cases.ops.selected_self_attention(x, *weights, 4, index, count, weight)
    expected = oracle.self_attention(x, *weights, 4, index, count, weight)
    torch.testing.assert_close(good, expected)
    for place in (99, 0):  # a head that does not exist, and one that is named twice
        wrong = torch.tensor([[1, 3], [0, place]], dtype=torch.int64)
        clamped = cases.ops.selected_self_attention(x, *weights, 4, wrong, count.long() * 5, weight)
        torch.testing.assert_close(clamped, expected)


@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
def test_one_row_whose_heads_begin_at_odd_addresses(dtype):
    """Rows of all tensors are aligned to 16 bytes, heads of 5 columns within them are not."""
    rand = cases.Random(1, dtype)
    x, weights = rand(1, 1, 16), cases.layer_weights(rand, 8, 5, 16)
    index, count = torch.tensor([[3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    weight = rand.selection(1, 8, count=[8])[2]
    cases.check(
        cases.ops.selected_self_attention, oracle.self_attention, [x, *weights], dtype,
        x, *weights, 8, index, count, weight,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_draws_the_mask_of_the_cpu(dtype):
    """One seed means one mask, whatever executes the selection: outputs and gradients agree."""
    rand = cases.Random(1, dtype)
    x, weights = rand(2, 7, 6), cases.layer_weights(rand, 3, 4, 6)
    index, count, weight = rand.selection(2, 3, count=[2, 3])
    for p in (0.4, 1.0):
        options = {"dropout_p": p, "dropout_seed": torch.tensor([12])}
        results = []
        for operators in (torch.ops.headwise, cases.ops):
            y = operators.selected_self_attention(x, *weights, 3, index, count, weight, **options)
            results.append((y, *torch.autograd.grad(y.sum(), [x, *weights, weight])))
        for a, b in zip(*results, strict=True):
            cases.close(b, a.double(), cases.BACKWARD[dtype], 0.1)


@pytest.mark.parametrize("kind", ["none", "causal", "ragged"])
@pytest.mark.parametrize(("d", "count"), [(32, [2, 0, 3]), (8, [1, 3, 3]), (72, [3, 3, 3])])
@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
def test_the_layer_by_the_attention_of_libtorch(dtype, d, count, kind, cuda_routes):
    """Packed rows without gaps between sequences, whatever each of them chose; what LibTorch does
    not support (ragged) goes through the kernels. On the host a substitute runs."""
    cuda_routes("flash")
    layer_case(dtype, 3, 37, 24, 3, d, kind, count, scale=0.3)


@pytest.mark.parametrize(("d", "count"), [(64, [2, 0, 3]), (8, [1, 3, 3]), (72, [3, 3, 1])])
@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
def test_the_layer_by_warpgroup_products(dtype, d, count, cuda_routes):
    """Two tiles of rows, the second of one warpgroup; heads that fill the swizzled rows or not."""
    cuda_routes(products="warpgroups")
    layer_case(dtype, 3, 150, 72, 3, d, "ragged", count, scale=0.3)


@pytest.mark.parametrize(("L", "S", "causal"), [(20, 33, False), (20, 20, True), (20, 20, False)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_core_by_the_attention_of_libtorch(weighted, L, S, causal, cuda_routes):
    cuda_routes("flash")
    rand = cases.Random(3, torch.bfloat16)
    q, k, v = rand(2, 4, L, 16), rand(2, 2, S, 16), rand(2, 2, S, 16)
    index, count, weight = rand.selection(2, 4, count=[0, 3])
    weight = weight if weighted else None
    cases.check(cases.ops.selected_attention, cases.core_reference,
                [t for t in (q, k, v, weight) if t is not None], torch.bfloat16,
                q, k, v, index, count, weight, is_causal=causal)  # fmt: skip


DECODING = ["none", "ragged", "scattered", "padding bias", "per head", "causal", "all hidden"]


@pytest.mark.parametrize("kind", DECODING)
@pytest.mark.parametrize(
    ("dtype", "d", "dv"),
    [
        (torch.float64, 6, 5),
        (torch.float32, 40, 64),
        (torch.bfloat16, 128, 128),
        (torch.float16, 200, 8),
    ],
    ids=str,
)
def test_decoding_splits_the_keys(dtype, d, dv, kind):
    """One query against 300 keys; query heads share key/value heads; some of these were not
    chosen."""
    rand = cases.Random(2, dtype)
    batch, num_heads, kv_heads, keys = 2, 12, 2, 300
    q, k = rand(batch, num_heads, 1, d), rand(batch, kv_heads, keys, d)
    v = rand(batch, kv_heads, keys, dv)
    index, count, weight = rand.selection(batch, num_heads, count=[1, 9])
    options = cases.masks(rand, kind, batch, num_heads, 1, keys)
    leaves = [q, k, v, weight] + [m for m in options.values() if cases.leaf(m)]
    cases.check(cases.ops.selected_attention, cases.core_reference, leaves, dtype,
                q, k, v, index, count, weight, **options)  # fmt: skip


def test_decoding_reads_an_index_as_it_is():
    """Another type, a slice of columns, and values out of range, which are left out."""
    rand = cases.Random(2, torch.float32)
    q, k, v = rand(2, 4, 1, 16), rand(2, 2, 40, 16), rand(2, 2, 40, 16)
    index = torch.tensor([[0, 3, -1], [2, -1, -1]])
    count = torch.tensor([2, 1])
    expected = cases.core_reference(q, k, v, index, count)
    wrong = torch.tensor([[0, 3, 99, 7], [-5, 2, 1, 7]])
    y = cases.ops.selected_attention(q, k, v, wrong[:, :3], torch.tensor([9, 2]))
    torch.testing.assert_close(y, expected)
    wrong = torch.tensor([[0, 0, 3, 3], [2, 2, 2, 0]])  # more places than the heads of a group
    y = cases.ops.selected_attention(q, k, v, wrong, torch.tensor([4, 3]))
    torch.testing.assert_close(y, expected)


#: The cases, for a module that imports them all.
__all__ = [name for name in dir() if name.startswith("test_")]
