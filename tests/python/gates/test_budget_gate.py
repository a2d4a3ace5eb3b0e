"""The kernel that evaluates a BudgetGate against the operators that the gate consists of."""

from __future__ import annotations

import math

import headwise as hw
import pytest
import torch
from torch import Tensor

ops = torch.ops.headwise
B, L, D, H, HIDDEN = 3, 140, 70, 11, 9


def masks(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "ragged":
        return torch.arange(length) >= torch.randint(0, length + 1, (batch, 1))
    if kind == "scattered":
        return torch.rand(length, batch).T < 0.4  # columns apart
    if kind == "nothing but padding":
        return torch.ones(batch, length, dtype=torch.bool)
    added = torch.randn(batch, length)
    return added.masked_fill(torch.rand(batch, length) < 0.4, -math.inf)


def arguments(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int = H,
    dtype: torch.dtype = torch.float32,
    fixed: float | None = None,
    progress: float = 0.1,
    min_heads: int = 1,
    rounding: str = "round",
) -> tuple:
    """Random parameters of this dtype, and buffers."""
    width = x.size(2)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    network = [rand(HIDDEN, width), rand(HIDDEN), rand(1, HIDDEN), rand(1)]
    return (
        x, mask, rand(width), torch.rand(width).to(dtype), rand(heads), rand(heads, width),
        *(network if fixed is None else [None] * 4), torch.tensor(progress),
        1.0 if fixed is None else fixed, 0.2, 0.9, 0.5, 0.95, 0.3, min_heads, rounding,
    )  # fmt: skip


def composed(args: tuple) -> tuple[Tensor, ...]:
    """The operators: they run where a gradient is wanted, here in the sums' type throughout."""
    wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
    args = tuple(a.to(wide) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with torch.enable_grad():
        found = ops.evaluate_budget_gate(*args[:4], args[4].requires_grad_(), *args[5:])
    return tuple(t.detach() for t in found)


def check(args: tuple) -> tuple[Tensor, ...]:
    with torch.no_grad():
        got = ops.evaluate_budget_gate(*args)
        direct = ops._budget_gate(*args)
    for a, b in zip(got, direct, strict=True):
        assert torch.equal(a, b)  # the kernel ran
    want = composed(args)
    for name, a, b in zip(("index", "count", "weight"), got, want, strict=False):
        assert torch.equal(a.to(b.dtype), b), name
    assert got[2].dtype == args[0].dtype
    for a, b in zip(got[3:], want[3:], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    return got


PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("kind", ["none", "ragged", "scattered", "nothing but padding", "added"])
@pytest.mark.parametrize(("dtype", "parameters"), PAIRS)
def test_against_the_operators(dtype, parameters, kind):
    torch.manual_seed(0)
    x = torch.randn(B, L, D).to(dtype)
    check(arguments(x, masks(kind, B, L), dtype=parameters))


@pytest.mark.parametrize("kind", ["none", "ragged", "added"])
@pytest.mark.parametrize(
    ("batch", "length", "width", "heads"),
    [(1, 1, 1, 1), (2, 0, 5, 3), (0, 4, 5, 3), (0, 0, 5, 3), (2, 4, 5, 0), (1, 700, 33, 2),
     (19, 3, 16, 64), (5, 257, 15, 12)],
)  # fmt: skip
@pytest.mark.parametrize("fixed", [None, 0.4])
def test_shapes(batch, length, width, heads, kind, fixed):
    torch.manual_seed(1)
    x = torch.randn(batch, length, width)
    got = check(arguments(x, masks(kind, batch, length), heads=heads, fixed=fixed))
    assert [list(t.shape) for t in got] == [
        [batch, heads], [batch], [batch, heads], [batch, heads], [batch]
    ]  # fmt: skip


@pytest.mark.parametrize("rounding", ["round", "ceil"])
@pytest.mark.parametrize("min_heads", [0, 1, 5, 20])
@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_counts(rounding, min_heads, progress):
    torch.manual_seed(2)
    options = {"rounding": rounding, "min_heads": min_heads, "progress": progress}
    x = 3 * torch.randn(40, 2, D)
    args = arguments(x, **options)
    count, budget = check(args)[1], check(args)[4]
    assert torch.equal(count, ops.budget_count(budget, H, min_heads, rounding))
    if progress == 1.0 and min_heads < 2:
        assert len(count.unique()) > 2
    for fixed in (0.04, 0.5, 1.0):
        check(arguments(x, fixed=fixed, **options))


def test_ties_go_to_the_lower_head():
    x = torch.randn(2, 3, D)
    args = list(arguments(x, heads=8, fixed=0.5))
    args[4], args[5] = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 1]), torch.zeros(8, D)
    assert check(tuple(args))[0].tolist() == [[1, 2, 3, 5, -1, -1, -1, -1]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype):
    """Sequence first, every other column, and one sequence for the whole batch."""
    torch.manual_seed(3)
    for x in (
        torch.randn(L, B, D).transpose(0, 1),
        torch.randn(B, L, 2 * D)[:, :, ::2],
        torch.randn(1, L, D).expand(B, L, D),
    ):
        x = x.to(dtype) if x.stride(0) else x
        check(arguments(x, masks("ragged", B, L)))
    args = list(arguments(torch.randn(B, L, D)))
    args[5] = args[5].T.contiguous().T
    check(tuple(args))


def test_padding_is_not_read():
    x = torch.randn(B, L, D)
    padding = masks("scattered", B, L)
    args = arguments(x, padding)
    with torch.no_grad():
        want = ops.evaluate_budget_gate(*args)
        dirty = x.masked_fill(padding[:, :, None], math.nan)
        got = ops.evaluate_budget_gate(dirty, *args[1:])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [5, 600])
def test_threads_change_nothing(threads, length):
    torch.manual_seed(4)
    args = arguments(torch.randn(21, length, D), masks("ragged", 21, length))
    found = []
    with torch.no_grad():
        for number in (1, 2, 3):
            threads(number)
            found.append(ops.evaluate_budget_gate(*args))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("spoilt", [0, 4, 9])
@torch.no_grad()
def test_what_is_not_finite(spoilt):
    """An input, a static relevance, and the bias of the budget, which spoils all heads."""
    args = list(arguments(torch.randn(2, 3, D)))
    args[spoilt] = args[spoilt].clone()
    args[spoilt].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="relevance must be finite, got -?nan at row 0, head 0"):
        ops.evaluate_budget_gate(*args)


def test_who_wants_gradients_gets_them():
    x = torch.randn(B, L, D, requires_grad=True)
    args = arguments(x)
    args = (*args[:12], 0.0, 1.0, *args[14:])  # no budget is held
    found = ops.evaluate_budget_gate(*args)  # nothing requires a gradient
    assert not any(t.requires_grad for t in found)
    bias = args[9].requires_grad_()
    found = ops.evaluate_budget_gate(*args)
    assert found[4].requires_grad
    assert torch.autograd.grad(found[4].sum(), bias)[0].abs() > 0
    args = arguments(torch.randn(B, L, D))
    tangent = torch.ones(H)

    def relevance(base: Tensor) -> Tensor:
        return ops.evaluate_budget_gate(*args[:4], base, *args[5:])[3]

    with torch.no_grad():
        _, along = torch.func.jvp(relevance, (args[4],), (tangent,))
        torch.testing.assert_close(along, torch.ones(B, H))
    gradient = torch.func.grad(lambda base: relevance(base).sum())(args[4])
    torch.testing.assert_close(gradient, torch.full((H,), float(B)))


def test_a_budget_that_begins_at_its_bound_learns():
    # torch.clamp has no gradient at its ends from some version on.
    torch.manual_seed(0)
    gate = hw.BudgetGate(keep=0.5, max_budget=0.5)
    layer = hw.MultiheadAttention(16, 4, gate=gate, batch_first=True).train()
    layer.gate.anneal(1.0)
    x = torch.randn(3, 5, 16)
    layer(x, x, x)[0].square().sum().backward()
    assert layer.gate.budget_out.bias.grad.abs() > 0
    with torch.no_grad():
        assert layer.eval().gate(x).count.tolist() == [2, 2, 2]


def module(budget: float | None) -> hw.BudgetGate:
    torch.manual_seed(5)
    gate = hw.BudgetGate(budget=budget, embed_dim=D, num_heads=H).eval()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


@pytest.mark.parametrize("budget", [None, 0.5])
@torch.no_grad()
def test_transforms(budget):
    gate = module(budget)
    x, padding = torch.randn(4, B, L, D), masks("ragged", B, L)
    want = [gate(part, padding) for part in x]
    mapped = torch.vmap(lambda part: gate(part, padding)[:4])(x)
    for i, selection in enumerate(want):
        for a, b in zip(mapped, selection[:4], strict=True):
            assert torch.equal(a[i], b)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(compiled(x[0], padding), want[0], strict=True):
        assert torch.equal(a, b)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
    shapes = {"x": {0: batch, 1: length}, "key_padding_mask": {0: batch, 1: length}}
    program = torch.export.export(gate, (x[0], padding), dynamic_shapes=shapes)
    other = torch.randn(2, 9, D), masks("ragged", 2, 9)
    for a, b in zip(program.module()(*other), gate(*other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fixed", [None, 0.5])
def test_opcheck(fixed):
    args = arguments(torch.randn(B, L, D), masks("ragged", B, L), fixed=fixed)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops._budget_gate.default, args, test_utils=tests)


def test_shapes_that_do_not_fit_are_refused():
    args = list(arguments(torch.randn(B, L, D)))
    args[2] = torch.zeros(D + 1)
    with torch.no_grad(), pytest.raises(RuntimeError):
        ops.evaluate_budget_gate(*args)
    args = list(arguments(torch.randn(B, L, D), torch.zeros(B, L + 1, dtype=torch.bool)))
    with torch.no_grad(), pytest.raises(RuntimeError):
        ops.evaluate_budget_gate(*args)
    args = list(arguments(torch.randn(B, L, D), rounding="up"))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"rounding must be round or ceil, got \"up\""),
    ):
        ops.evaluate_budget_gate(*args)
