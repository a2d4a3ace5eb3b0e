"""The CUDA kernels and their launchers on an emulated device, against the oracle.

tests/cpp/emulator runs the very kernels that a GPU runs, with every thread of a block as a fiber,
so that a machine without a GPU checks their arithmetic, indices, barriers and copies. Not checked
here: that nvcc and the GPU agree with the emulator, and speed. test_cuda.py runs the same cases on
a GPU.
"""

import math
import os
from pathlib import Path

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import test_attention_ops as cases
import torch
from support import oracle
from test_attention_ops import (  # noqa: F401  (collected again, on the emulated device)
    test_heads_never_chosen_get_exactly_no_gradient,
    test_infinite_and_nan_inputs_reach_what_they_reach_in_torch,
    test_no_heads_give_the_output_bias,
    test_random_shapes,
    test_tiny_sizes,
    test_weight_may_have_another_dtype,
    test_what_was_not_chosen_is_not_read,
)
from test_attention_statistics import DTYPES as STATISTICS_DTYPES
from test_attention_statistics import KINDS, masks, plain
from test_grouped import Executors


def find_library():
    """What tests/cpp builds, in HEADWISE_BUILD_DIR or the newest build folder."""
    root = Path(__file__).resolve().parents[3]
    folder = os.environ.get("HEADWISE_BUILD_DIR")
    folders = [Path(folder)] if folder else [root / "build", *sorted(root.glob("build*"))]
    found = [p for f in folders if (p := f / "tests" / "cpp" / "libheadwise_emulated.so").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


LIBRARY = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tests/cpp is not built")
EMULATED = None
if LIBRARY:
    torch.ops.load_library(str(LIBRARY))
    EMULATED = Executors(torch.ops.headwise_emulated)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """New tensors begin as NaN, and every access of a kernel is watched (emulator/memory.h)."""
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "ops", EMULATED)
    torch.ops.headwise_emulated.watch(True)
    yield
    torch.ops.headwise_emulated.watch(False)


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


@pytest.mark.parametrize("kind", cases.MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_attention(dtype, kind):
    """Two tiles of rows in the last sequence's products, one head nobody chose, odd sizes."""
    layer_case(dtype, 2, 69, 24, 3, 16, kind, [2, 3])


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
def test_views_at_odd_addresses(dtype, way, monkeypatch):
    """Nothing is read 16 bytes at a time where its address does not allow it."""
    monkeypatch.setenv("HEADWISE_CUDA_ATTENTION", way[0])
    monkeypatch.setenv("HEADWISE_CUDA_PRODUCTS", way[1])
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


@pytest.mark.parametrize("way", ["kernels", "flash"])
def test_results_are_laid_out_as_tracing_expects(way, monkeypatch):
    """Shapes, strides and dtypes of forward and backward are those of the Meta kernels."""
    monkeypatch.setenv("HEADWISE_CUDA_ATTENTION", way)
    rand = cases.Random(5, torch.bfloat16)
    index, count, weight = rand.selection(2, 4, count=[1, 3], dtype=torch.float32)
    masks = [None, None, True, 0.0, None, None]
    x = rand(5, 2, 32).transpose(0, 1)  # [B, L, D]
    layer = [*cases.layer_weights(rand, 4, 8, 32), 4, index[:, :3], count, weight]
    core = [rand(2, 5, 4, 16).transpose(1, 2), *(rand(2, 2, 5, 16) for _ in range(2))]
    for name, arguments, first_saved, needs in (
        ("self_attention", [x, *layer, *masks], 1, [True] * 6 + [False]),
        ("attention", [*core, index, count, weight, *masks], 0, [True] * 4 + [False]),
        ("attention", [*core, index, count, None, *masks], 0, [True] * 3 + [False] * 2),
    ):
        arguments = [t.detach() if torch.is_tensor(t) else t for t in arguments]
        traced = [t.to("meta") if torch.is_tensor(t) else t for t in arguments]
        got = getattr(torch.ops.headwise_emulated, f"{name}_forward")(*arguments)
        expected = getattr(torch.ops.headwise, f"_selected_{name}_forward")(*traced)
        backward = getattr(torch.ops.headwise_emulated, f"{name}_backward")(
            torch.ones_like(got[0]), *arguments, *got[first_saved:], needs
        )
        expected_backward = getattr(torch.ops.headwise, f"_selected_{name}_backward")(
            torch.ones_like(expected[0]), *traced, *expected[first_saved:], needs
        )
        for a, b in zip((*got, *backward), (*expected, *expected_backward), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


@pytest.mark.parametrize("kind", ["none", "causal", "ragged"])
def test_several_tiles_of_rows(kind):
    layer_case(torch.bfloat16, 1, 150, 16, 2, 8, kind, [2])


@pytest.mark.parametrize("kind", ["none", "all at once", "all hidden"])
@pytest.mark.parametrize("added", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_multihead_attention(dtype, added, kind):
    cases.test_multihead_attention(dtype, added, kind, (8, 16, 8, 24, 8))


@pytest.mark.parametrize("kind", cases.MASKS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_core_attention(dtype, weighted, kind):
    cases.test_core_attention(dtype, weighted, kind)


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
    for place in (99, 0):  # a head that is not there, and one that is named twice
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
def test_the_layer_by_the_attention_of_libtorch(dtype, d, count, kind, monkeypatch):
    """Packed rows without room between sequences, whatever each of them chose; what LibTorch does
    not take (ragged) goes through the kernels. On the host a stand-in takes its place."""
    monkeypatch.setenv("HEADWISE_CUDA_ATTENTION", "flash")
    layer_case(dtype, 3, 37, 24, 3, d, kind, count, scale=0.3)


@pytest.mark.parametrize(("d", "count"), [(64, [2, 0, 3]), (8, [1, 3, 3]), (72, [3, 3, 1])])
@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
def test_the_layer_by_warpgroup_products(dtype, d, count, monkeypatch):
    """Two tiles of rows, the second of one warpgroup; heads that fill the swizzled rows or not."""
    monkeypatch.setenv("HEADWISE_CUDA_PRODUCTS", "warpgroups")
    layer_case(dtype, 3, 150, 72, 3, d, "ragged", count, scale=0.3)


@pytest.mark.parametrize(("L", "S", "causal"), [(20, 33, False), (20, 20, True), (20, 20, False)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_core_by_the_attention_of_libtorch(weighted, L, S, causal, monkeypatch):
    monkeypatch.setenv("HEADWISE_CUDA_ATTENTION", "flash")
    rand = cases.Random(3, torch.bfloat16)
    q, k, v = rand(2, 4, L, 16), rand(2, 2, S, 16), rand(2, 2, S, 16)
    index, count, weight = rand.selection(2, 4, count=[0, 3])
    weight = weight if weighted else None
    cases.check(cases.ops.selected_attention, cases.core_reference,
                [t for t in (q, k, v, weight) if t is not None], torch.bfloat16,
                q, k, v, index, count, weight, is_causal=causal)  # fmt: skip


@pytest.mark.parametrize(("name", "words"), [("ATTENTION", "kernels or flash"),
                                             ("PRODUCTS", "warps or warpgroups")])  # fmt: skip
def test_choices_are_checked(name, words, monkeypatch):
    monkeypatch.setenv(f"HEADWISE_CUDA_{name}", "fast")
    with pytest.raises(ValueError, match=f"HEADWISE_CUDA_{name} must be {words}, got fast"):
        layer_case(torch.bfloat16, 1, 5, 8, 1, 8, "none", [1])


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
    """One query against 300 keys; query heads share key/value heads; some of these nobody chose."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 16), (5, 33), (0, 4), (3, 0), (2, 300)])
def test_select_heads(dtype, shape):
    relevance = torch.randn(shape)
    relevance[::2] = relevance[::2].round()  # ties
    relevance = relevance.to(dtype)
    count = torch.randint(0, shape[1] + 1, (shape[0],), dtype=torch.int32)
    got = torch.ops.headwise_emulated.select_heads(relevance, count)
    assert torch.equal(got, torch.ops.headwise.select_heads(relevance, count))


@pytest.mark.parametrize("mask", ["none", "ragged", "added", "nothing but padding"])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("rounding", ["round", "ceil"])
@pytest.mark.parametrize("fixed", [None, 0.4])
def test_budget_gate(dtype, parameters, mask, rounding, fixed):
    """Two launches against the operators that the gate consists of."""
    batch, length, width, heads, hidden = 3, 140, 300, 37, 11

    def rand(*shape):
        return torch.randn(shape).to(parameters)

    x = torch.randn(batch, length, width).to(dtype)
    masks = {
        "none": None,
        "ragged": torch.arange(length) >= torch.tensor([[140], [3], [77]]),
        "added": torch.zeros(batch, length).masked_fill(torch.rand(batch, length) < 0.3, -math.inf),
        "nothing but padding": torch.ones(batch, length, dtype=torch.bool),
    }
    network = [rand(hidden, width), rand(hidden), rand(1, hidden), rand(1)]
    arguments = (
        x, masks[mask], torch.randn(width), torch.rand(width), rand(heads), rand(heads, width),
        *(network if fixed is None else [None] * 4), torch.tensor(0.1), fixed or 1.0,
        0.2, 0.9, 0.5, 0.95, 0.3, 2, rounding,
    )  # fmt: skip
    assert torch.ops.headwise_emulated.takes_budget_gate(*arguments)
    got = torch.ops.headwise_emulated.budget_gate(*arguments)
    # The composition rounds the mean to x's dtype: it is given the same numbers in more digits.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.ops.headwise.evaluate_budget_gate(x.to(wide), *arguments[1:])
    for name, a, b in zip(("index", "count"), got[:2], expected[:2], strict=True):
        assert torch.equal(a, b), name
    assert got[2].dtype == dtype and torch.equal(got[2].to(wide), expected[2])
    for a, b in zip(got[3:], expected[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [*STATISTICS_DTYPES, (torch.bfloat16, 1e-4), (torch.float16, 1e-4)]
)
def test_attention_statistics(kind, dtype, tolerance):
    B, H, Hkv, L, S, d = shape = (2, 4, 2, 18, 70, 36)
    q, k = (
        torch.randn(B, H, L, d).to(dtype) * 2,
        torch.randn(B, S, Hkv, d).to(dtype).transpose(1, 2),
    )
    arguments = masks(kind, *shape[:2], L, S)
    options = [
        arguments.get(name) for name in ("key_padding_mask", "query_padding_mask", "attn_mask")
    ]
    got = torch.ops.headwise_emulated.attention_statistics(
        q, k, *options, arguments.get("is_causal", False), None
    )
    for value, expected in zip(got, plain(q, k, **arguments), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 37, 9), (1, 2, 1, 1), (2, 2, 0, 5)])
def test_copies_of_heads(dtype, shape):
    """Rows of some pairs out of a tensor with strides of its own, and back."""
    B, H, R, w = shape
    tensor = torch.randn(B, R, H, w).to(dtype).transpose(1, 2)
    pairs = torch.randperm(B * H)[: max(1, B * H - 2)]
    batch, head = (pairs // H).int(), (pairs % H).int()
    device = torch.ops.headwise_emulated
    packed = device.gather_heads(tensor, batch, head, 1)
    assert torch.equal(packed, tensor[batch.long(), head.long()])
    shared = device.gather_heads(tensor[:, : H // 2], batch, head, 2)
    assert torch.equal(shared, tensor[batch.long(), head.long() // 2])
    back = torch.zeros(B, H, R, w, dtype=dtype)
    device.scatter_heads(packed, batch, head, back)
    expected = torch.zeros_like(back)
    expected[batch.long(), head.long()] = packed
    assert torch.equal(back, expected)


# Which of two threads is caught depends on the order in which they ran.
UNORDERED = "without a barrier since|a copy may still be under way"
FAULTS = ["", *[UNORDERED] * 6, "with nothing to order them", "beside the shared memory",
          "outside of every tensor"]  # fmt: skip


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_the_emulator_names_mistakes(fault):
    """Kernels with one mistake each (emulator/faults.h): what only a device would show is found."""
    if not torch.ops.headwise_emulated.watch(True):
        pytest.skip("this build has a sanitizer of its own")
    if not FAULTS[fault]:
        torch.ops.headwise_emulated.faulty(fault)
        return
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        torch.ops.headwise_emulated.faulty(fault)
