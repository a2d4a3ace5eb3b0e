"""select_heads and selection_mask: the hard top-k and the mask it stands for."""

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.headwise


def plain_select(relevance, count):
    """Row by row in plain Python: sort by (-relevance, head), keep count, list ascending."""
    rows = []
    for row, k in zip(relevance.double().tolist(), count.tolist(), strict=True):
        chosen = sorted(sorted(range(len(row)), key=lambda h, row=row: (-row[h], h))[:k])
        rows.append(chosen + [-1] * (len(row) - k))
    return torch.tensor(rows, dtype=torch.int32).reshape(relevance.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 12), (3, 33), (0, 4), (4, 0), (2, 130)])
def test_select_heads_equals_sorting(dtype, shape):
    # Half the values are rounded to a few levels, so that ties are frequent.
    relevance = torch.randn(shape)
    relevance[::2] = relevance[::2].round()
    relevance = relevance.to(dtype)
    for count_dtype in (torch.int32, torch.int64):
        count = torch.randint(0, shape[1] + 1, (shape[0],), dtype=count_dtype)
        index = ops.select_heads(relevance, count)
        assert index.dtype == torch.int32
        assert torch.equal(index, plain_select(relevance, count))


def test_ties_go_to_the_lower_head():
    index = ops.select_heads(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), torch.tensor([3]))
    assert index.tolist() == [[0, 1, 2, -1]]


def test_non_contiguous_relevance_and_requires_grad():
    relevance = torch.randn(6, 4, requires_grad=True).t()
    count = torch.tensor([0, 9, 3, 9, 6, 9, 1])[::2]
    index = ops.select_heads(relevance, count)
    assert not index.requires_grad
    assert torch.equal(index, plain_select(relevance, count))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.int64])
def test_selection_mask(dtype):
    relevance = torch.randn(7, 9)
    count = torch.randint(0, 10, (7,), dtype=torch.int32)
    index = ops.select_heads(relevance, count)
    mask = ops.selection_mask(index, count, dtype)
    expected = torch.zeros(7, 9, dtype=dtype)
    for b in range(7):
        expected[b, index[b, : count[b]].long()] = 1
    assert mask.dtype == dtype
    assert torch.equal(mask, expected)


BAD = [
    (torch.zeros(4), torch.zeros(4).int(), ValueError, r"relevance must have shape \[batch, heads"),
    (
        torch.zeros(4, 2).int(),
        torch.zeros(4).int(),
        TypeError,
        "relevance must be a floating-point",
    ),
    (torch.zeros(4, 2), torch.zeros(3).int(), ValueError, r"count must have shape \[4\]"),
    (torch.zeros(4, 2), torch.zeros(4), TypeError, "count must be int32 or int64"),
    (
        torch.zeros(2, 2),
        torch.tensor([1, 3]),
        ValueError,
        r"count must lie in \[0, 2\], got 3 at row 1",
    ),
    (torch.zeros(2, 2), torch.tensor([-1, 0]), ValueError, r"count must lie in \[0, 2\], got -1"),
    (
        torch.tensor([[0.0, float("nan")]]),
        torch.tensor([1]),
        ValueError,
        "relevance must be finite",
    ),
    (
        torch.tensor([[0.0, float("inf")]]),
        torch.tensor([1]),
        ValueError,
        "got inf at row 0, head 1",
    ),
]


@pytest.mark.parametrize("relevance, count, error, text", BAD)
def test_select_heads_refuses(relevance, count, error, text):
    with pytest.raises(error, match=text):
        ops.select_heads(relevance, count)


def test_selection_mask_refuses():
    count = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"index must lie in \[0, 3\).*got 3 at row 0, position 1"):
        ops.selection_mask(torch.tensor([[0, 3, -1]]), count, torch.float32)
    with pytest.raises(TypeError, match="index must be int32 or int64"):
        ops.selection_mask(torch.zeros(1, 3), count, torch.float32)
    with pytest.raises(ValueError, match="count must lie in"):
        ops.selection_mask(torch.zeros(1, 1).int(), count, torch.float32)


def test_opcheck():
    relevance = torch.randn(3, 5, requires_grad=True)
    count = torch.tensor([0, 5, 2], dtype=torch.int32)
    torch.library.opcheck(ops.select_heads.default, (relevance, count))
    index = ops.select_heads(relevance, count)
    torch.library.opcheck(ops.selection_mask.default, (index, count, torch.float64))


def test_compiles_with_dynamic_shapes():
    def f(relevance, count):
        index = ops.select_heads(relevance * 2, count)
        return index, ops.selection_mask(index, count, torch.float32)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, H in [(3, 5), (2, 8)]:
        relevance, count = torch.randn(B, H), torch.randint(0, H + 1, (B,))
        for got, expected in zip(compiled(relevance, count), f(relevance, count), strict=True):
            assert torch.equal(got, expected)
