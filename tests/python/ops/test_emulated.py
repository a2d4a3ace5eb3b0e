"""The CUDA kernels and their launchers on an emulated device, against the oracle.

tests/cpp/emulator runs the very kernels that a GPU runs, with every thread of a block as a fiber,
so that a machine without a GPU checks their arithmetic, indices, barriers and copies. Not checked
here: that nvcc and the GPU agree with the emulator, and speed. test_cuda.py runs the same cases on
a GPU.
"""

import math
import re

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch
from support import attention_cases as cases
from support.attention_cases import (  # noqa: F401  (collected again, on the emulated device)
    test_heads_never_chosen_get_exactly_no_gradient,
    test_infinite_and_nan_inputs_reach_what_they_reach_in_torch,
    test_no_heads_give_the_output_bias,
    test_random_shapes,
    test_tiny_sizes,
    test_weight_may_have_another_dtype,
    test_what_was_not_chosen_is_not_read,
)
from support.attention_statistics import DTYPES as STATISTICS_DTYPES
from support.attention_statistics import KINDS, masks, plain
from support.emulator import EMULATED, LIBRARY
from support.kernel_cases import *  # noqa: F403  (collected here)
from support.kernel_cases import DTYPES, layer_case

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="tests/cpp is not built")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """New tensors begin as NaN, and every access of a kernel is watched (emulator/memory.h)."""
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "ops", EMULATED)
    torch.ops.headwise_emulated.watch(True)
    yield
    torch.ops.headwise_emulated.watch(False)


@pytest.mark.parametrize("kind", cases.MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_attention(dtype, kind):
    """Two tiles of rows in the last sequence's products, one head that no sequence chose, odd
    sizes."""
    layer_case(dtype, 2, 69, 24, 3, 16, kind, [2, 3])


@pytest.mark.parametrize("way", ["kernels", "flash"])
def test_results_are_laid_out_as_tracing_expects(way, cuda_routes):
    """Shapes, strides and dtypes of forward and backward are those of the Meta kernels."""
    cuda_routes(way)
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


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"attention": "fast"}, "attention must be 'kernels' or 'flash', got 'fast'"),
        ({"products": "\x1b"}, r"products must be 'warps' or 'warpgroups', got '\u001b'"),
    ],
)
def test_routes_are_checked_and_returned(cuda_routes, wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cuda_routes(**wanted)
    assert cuda_routes("flash", "warpgroups") == ("kernels", "warps")
    assert cuda_routes() == ("flash", "warpgroups")
