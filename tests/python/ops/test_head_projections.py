"""The projections of the chosen heads against the oracle, and under torch's transforms."""
# ruff: noqa: E501  (the table of bad input reads best with one case per line)

import headwise  # noqa: F401  (registers torch.ops.headwise)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.attention_cases import Random, check

ops = torch.ops.headwise


class Executors:
    """The projections by the forward and backward operators of one executor."""

    def __init__(self, operators, prefix=""):
        def op(name):
            return getattr(operators, prefix + name)

        class Project(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                ctx.arguments = arguments
                return op("projection")(*arguments)

            @staticmethod
            def backward(ctx, grad):
                x, weight, _, num_heads, index, count = ctx.arguments
                needs = list(ctx.needs_input_grad[:3])
                g = op("projection_backward")(grad, x, weight, num_heads, index, count, needs)
                return (*[a if n else None for a, n in zip(g, needs, strict=True)], *[None] * 3)

        class Output(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                ctx.arguments = arguments
                return op("output_projection")(*arguments)

            @staticmethod
            def backward(ctx, grad):
                heads, weight, _, index, count, factor = ctx.arguments
                needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
                g = op("output_projection_backward")(
                    grad, heads, weight, index, count, factor, needs
                )
                g = [a if need else None for a, need in zip(g, needs, strict=True)]
                return (*g[:3], None, None, g[3])

        self.selected_projection = Project.apply
        self._output = Output.apply

    def selected_output_projection(self, heads, weight, bias, index, count, head_weight=None):
        return self._output(heads, weight, bias, index, count, head_weight)


ATEN = Executors(ops, "_aten_")  # the route of CUDA devices without kernels, on the CPU


@pytest.fixture(params=[ops, ATEN], ids=["operators", "aten"])
def run(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def projection(x, weight, bias, num_heads, index, count):
    """Every head, [B, H, L, d], times 1 or 0."""
    y = torch.nn.functional.linear(x, weight, bias)
    y = y.unflatten(2, (num_heads, weight.shape[0] // max(num_heads, 1))).transpose(1, 2)
    ones = torch.ones(x.shape[0], num_heads, dtype=x.dtype)
    return y * oracle.dense_weight(index, count, ones)[:, :, None, None]


def output_projection(heads, weight, bias, index, count, head_weight=None):
    """Every head times its weight or 0, joined, projected."""
    if head_weight is None:
        head_weight = torch.ones(heads.shape[:2], dtype=heads.dtype)
    factor = oracle.dense_weight(index, count, head_weight).to(heads.dtype)
    joined = (heads * factor[:, :, None, None]).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(joined, weight, bias)


def check_projection(run, dtype, batch, length, width, num_heads, d, bias=True, count=None):
    rand = Random(3, dtype)
    x, weight = rand(batch, length, width, scale=1.0), rand(num_heads * d, width)
    b = rand(num_heads * d) if bias else None
    index, count, _ = rand.selection(batch, num_heads, count=count)
    leaves = [t for t in (x, weight, b) if t is not None]
    return check(
        run.selected_projection, projection, leaves, dtype, x, weight, b, num_heads, index, count
    )


def check_output(run, dtype, batch, length, width, num_heads, d, bias=True, count=None, **options):
    rand = Random(4, dtype)
    heads, weight = rand(batch, num_heads, length, d, scale=1.0), rand(width, num_heads * d)
    b = rand(width) if bias else None
    index, count, factor = rand.selection(batch, num_heads, count=count)
    arguments = [heads, weight, b, index, count]
    if options.get("weighted", True):
        arguments.append(factor)
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    return check(run.selected_output_projection, output_projection, leaves, dtype, *arguments)


# Batches, lengths and widths for every kernel: decoding steps with few rows, short sequences that
# are multiplied together, several blocks of rows and columns, widths that fit no vector.
SIZES = [
    (1, 1, 32, 4, 16),
    (3, 1, 40, 4, 24),
    (16, 1, 96, 5, 32),
    (40, 1, 16, 3, 8),
    (2, 3, 20, 4, 5),
    (7, 9, 72, 4, 16),
    (3, 137, 136, 4, 24),
    (2, 130, 20, 3, 7),
    (1, 300, 16, 2, 40),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(run, dtype, size):
    check_projection(run, dtype, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_projection(run, dtype, size):
    check_output(run, dtype, *size)


@pytest.mark.parametrize("size", [(0, 3), (2, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("count", [0, 2, 3])
def test_empty_batches_no_rows_no_heads_all_heads(run, size, count):
    for bias in (False, True):
        check_projection(run, torch.float32, *size, 16, 3, 8, bias, count)
        check_output(run, torch.float32, *size, 16, 3, 8, bias, count, weighted=bias)


@pytest.mark.parametrize("width", [0, 6])
def test_layers_without_heads_or_columns(run, width):
    check_projection(run, torch.float64, 2, 3, width, 0, 4)
    check_output(run, torch.float64, 2, 3, width, 0, 4)
    check_projection(run, torch.float64, 2, 3, width, 2, 4, count=1)
    check_output(run, torch.float64, 2, 3, width, 2, 4, count=1)


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 9),
    st.integers(0, 40),
    st.integers(1, 48),
    st.integers(1, 6),
    st.integers(1, 24),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes(dtype, batch, length, width, num_heads, d, bias):
    check_projection(ops, dtype, batch, length, width, num_heads, d, bias)
    check_output(ops, dtype, batch, length, width, num_heads, d, bias, weighted=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 5, 70])
def test_what_was_not_chosen_is_not_read(run, dtype, length):
    batch, num_heads, d, width = 3, 4, 16, 24
    rand = Random(5, dtype)
    index, count, factor = rand.selection(batch, num_heads, count=[1, 0, 2])
    index[:, 2:] = 77  # behind the count
    chosen = oracle.dense_weight(index, count, torch.ones(batch, num_heads)).bool()
    unused = ~chosen.any(0).repeat_interleave(d)
    assert unused.any()

    x, weight = rand(batch, length, width), rand(num_heads * d, width)
    weight.data[unused] = torch.nan
    y = run.selected_projection(x, weight, None, num_heads, index, count)
    assert torch.isfinite(y).all() and not y[~chosen].any()
    upstream = torch.randn_like(y)
    upstream[~chosen] = torch.nan  # the gradient of what was not computed is not read
    for gradient in torch.autograd.grad(y, [x, weight], upstream):
        assert torch.isfinite(gradient).all()
    assert not gradient[unused].any()

    heads, weight = rand(batch, num_heads, length, d), rand(width, num_heads * d)
    heads.data[~chosen], weight.data[:, unused], factor.data[~chosen] = (torch.nan,) * 3
    y = run.selected_output_projection(heads, weight, None, index, count, factor)
    assert torch.isfinite(y).all() and not y[1].any()
    gradients = torch.autograd.grad(y, [heads, weight, factor], torch.randn_like(y))
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
    assert not gradients[0][~chosen].any() and not gradients[1][:, unused].any()
    assert not gradients[2][~chosen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 6, 70])
def test_inputs_by_strides(run, dtype, length):
    """Transposed, expanded, sliced and turned around."""
    batch, num_heads, d, width = 4, 3, 16, 24
    rand = Random(6, dtype)
    index, count, factor = rand.selection(batch, num_heads, count=[1, 3, 2, 0])

    def same(operator, given, rest, leaf):
        plain = [t.detach().contiguous().requires_grad_() for t in (given, leaf)]
        y, expected = operator(given, leaf, *rest), operator(*plain, *rest)
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)
        got = torch.autograd.grad(y, [given, leaf], upstream)
        for a, b in zip(got, torch.autograd.grad(expected, plain, upstream), strict=True):
            torch.testing.assert_close(a, b)

    weight = rand(num_heads * d, width)
    turned = rand(width, num_heads * d).detach().t().requires_grad_()
    for x in (
        rand(length, batch, width).detach().transpose(0, 1),
        rand(batch, length, 2 * width).detach()[:, :, ::2],
        rand(1, length, width).detach().expand(batch, -1, -1),
        rand(batch, 1, width).detach().expand(-1, length, -1),
        rand(batch, length, width + 1).detach()[:, :, 1:],
    ):
        for w in (weight, turned):
            same(run.selected_projection, x.requires_grad_(), (None, num_heads, index, count), w)
    weight = rand(width, num_heads * d)
    turned = rand(num_heads * d, width).detach().t().requires_grad_()
    for heads in (
        rand(batch, length, num_heads, d).detach().transpose(1, 2),
        rand(batch, num_heads, d, length).detach().transpose(2, 3),
        rand(batch, num_heads, 1, d).detach().expand(-1, -1, length, -1),
        rand(1, 1, length, d).detach().expand(batch, num_heads, -1, -1),
        rand(batch, num_heads, length, d + 3).detach()[..., 2:-1],
    ):
        for w in (weight, turned):
            rest = (None, index, count, factor)
            same(run.selected_output_projection, heads.requires_grad_(), rest, w)


def test_few_columns_of_index_and_int64(run):
    """index [B, K] with K < H, as a bound on the heads of a sequence."""
    rand = Random(8, torch.float64)
    index, count = torch.tensor([[1, 3], [0, -1]]), torch.tensor([2, 1])
    x, weight, heads = rand(2, 5, 6), rand(16, 6), rand(2, 4, 5, 4)
    y = run.selected_projection(x, weight, None, 4, index, count)
    torch.testing.assert_close(y, projection(x, weight, None, 4, index, count))
    weight = rand(6, 16)
    y = run.selected_output_projection(heads, weight, None, index.int(), count.int())
    torch.testing.assert_close(y, output_projection(heads, weight, None, index, count))


def test_the_three_pieces_are_the_layer():
    """Projections, core and output give what selected_self_attention gives."""
    rand = Random(9, torch.float64)
    x, w, b, out, out_b = rand(2, 7, 12), rand(36, 12), rand(36), rand(12, 12), rand(12)
    index, count, weight = rand.selection(2, 3, count=[1, 2])
    expected = ops.selected_self_attention(x, w, b, out, out_b, 3, index, count, weight)
    q, k, v = (
        ops.selected_projection(x, wi, bi, 3, index, count)
        for wi, bi in zip(w.chunk(3), b.chunk(3), strict=True)
    )
    context = ops.selected_attention(q, k, v, index, count)
    y = ops.selected_output_projection(context, out, out_b, index, count, weight)
    torch.testing.assert_close(y, expected)
    leaves = [x, w, b, out, out_b, weight]
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_select_groups(groups):
    g = torch.Generator().manual_seed(groups)
    index, count, _ = oracle.random_selection(9, 8, g)
    got, number = ops.select_groups(index, count, 8, groups)
    for b in range(9):
        wanted = sorted({h // (8 // groups) for h in index[b, : count[b]].tolist()})
        assert got[b].tolist() == wanted + [-1] * (groups - len(wanted))
        assert number[b] == len(wanted)
    assert got.dtype == number.dtype == torch.int32
    few = ops.select_groups(index[:, :3].long(), count.clamp(max=3).long(), 8, groups)
    assert few[0].shape == (9, groups)
    empty = ops.select_groups(index[:0], count[:0], 8, groups)
    assert empty[0].shape == (0, groups) and empty[1].shape == (0,)


def projection_arguments(dtype=torch.float64, batch=2, length=5):
    rand = Random(1, dtype)
    index, count, _ = rand.selection(batch, 3, count=2)
    return rand(batch, length, 6), rand(12, 6), rand(12), 3, index, count


def output_arguments(dtype=torch.float64, batch=2, length=5):
    rand = Random(2, dtype)
    index, count, weight = rand.selection(batch, 3, count=2)
    return rand(batch, 3, length, 4), rand(6, 12), rand(6), index, count, weight


CASES = {
    "projection": (ops.selected_projection, projection_arguments),
    "output": (ops.selected_output_projection, output_arguments),
}


def leaves_of(arguments):
    return [x for x in arguments if torch.is_tensor(x) and x.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    operator, make = CASES[name]
    arguments = make()
    for absent in (False, True):
        given = list(arguments)
        if absent:
            given[2] = None

        def run(*values, given=given):
            values = iter(values)
            fresh = (next(values) if torch.is_tensor(x) and x.requires_grad else x for x in given)
            return operator(*fresh)

        assert torch.autograd.gradcheck(run, leaves_of(given))


def test_some_gradients_only(run):
    x, weight, bias, num_heads, index, count = projection_arguments()
    heads, out, out_bias, _, _, factor = output_arguments()
    whole = {}
    for wanted in [(0, 1, 2), (0,), (1,), (2,)]:
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        y = run.selected_projection(*given, num_heads, index, count)
        for i, g in zip(wanted, torch.autograd.grad(y.sum(), leaves_of(given)), strict=True):
            torch.testing.assert_close(g, whole.setdefault(i, g))
    whole = {}
    for wanted in [(0, 1, 2, 3), (0,), (1,), (2,), (3,)]:
        tensors = (heads, out, out_bias, factor)
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = run.selected_output_projection(*given[:3], index, count, given[3])
        for i, g in zip(wanted, torch.autograd.grad(y.sum(), leaves_of(given)), strict=True):
            torch.testing.assert_close(g, whole.setdefault(i, g))


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    operator, make = CASES[name]
    arguments = make()
    torch.library.opcheck(operator.default, arguments)
    torch.library.opcheck(operator.default, (*arguments[:2], None, *arguments[3:]))


def test_internal_operators_and_select_groups_pass_opcheck():
    x, weight, _, num_heads, index, count = projection_arguments()
    tests = ("test_schema", "test_faketensor")
    y = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.library.opcheck(
        ops._selected_projection_backward.default,
        (y, x.detach(), weight.detach(), num_heads, index, count, [True, False, True]),
        test_utils=tests,
    )
    heads, weight, _, index, count, factor = output_arguments()
    y = torch.randn(2, 5, 6, dtype=torch.float64)
    tensors = (heads.detach(), weight.detach(), index, count, factor.detach())
    torch.library.opcheck(
        ops._selected_output_projection_backward.default,
        (y, *tensors, [True, False, True, True]),
        test_utils=tests,
    )
    torch.library.opcheck(ops.select_groups.default, (index, count, 4, 2))


def test_second_derivative_says_that_there_is_none():
    for (operator, make), name in zip(CASES.values(), ("", "_output"), strict=True):
        arguments = make()
        y = operator(*arguments)
        (gradient,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match=f"_selected{name}_projection_backward"):
            gradient.sum().backward()


def decode(x, w, b, out, out_b, index, count, weight):
    """The steps of a model with rotations between the operators."""
    q = ops.selected_projection(x, w, b, 3, index, count)
    groups, used = ops.select_groups(index, count, 3, 1)
    k = ops.selected_projection(x, w[:4], b[:4], 1, groups, used)
    context = ops.selected_attention(q.cos(), k.sin(), k, index, count)
    return ops.selected_output_projection(context, out, out_b, index, count, weight) * 2


def decode_arguments(dtype=torch.float64, batch=2, length=5):
    x, w, b, _, index, count = projection_arguments(dtype, batch, length)
    _, out, out_b, _, _, weight = output_arguments(dtype, batch, length)
    return x, w, b, out, out_b, index, count, weight


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    compiled = torch.compile(decode, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = decode_arguments()
    leaves = leaves_of(arguments)
    y, expected = compiled(*arguments), decode(*arguments)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), expected)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(decode_arguments(torch.float32)[1:5])

    def forward(self, x, index, count, weight):
        return decode(x, *self.weights, index, count, weight)


def test_export_with_a_dynamic_batch_and_length():
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    layer = Layer()

    def inputs(*sizes):
        x, *_, index, count, weight = decode_arguments(torch.float32, *sizes)
        return x.detach(), index, count, weight.detach()

    program = torch.export.export(
        layer,
        inputs(2, 5),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}, {0: batch}),
    )
    given = inputs(4, 9)
    torch.testing.assert_close(program.module()(*given), layer(*given))


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    operator, make = CASES[name]
    arguments = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator(*arguments)
    assert y.dtype == torch.bfloat16
    low = [x.detach().bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
           for x in arguments[:5]]  # fmt: skip
    torch.testing.assert_close(y, operator(*low, *arguments[5:]))
    leaves = leaves_of(arguments)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.float().sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype and torch.isfinite(gradient).all()


def test_vmap():
    """A second batch dimension: torch falls back to a loop."""
    x, w, b, num_heads, _, _ = (t.detach() if torch.is_tensor(t) else t
                                for t in projection_arguments())  # fmt: skip
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 5, 6, generator=g, dtype=torch.float64)
    index, count, weight = (
        torch.stack(t)
        for t in zip(
            *(oracle.random_selection(2, 3, g, dtype=x.dtype) for _ in range(3)), strict=True
        )
    )
    out = torch.randn(6, 12, generator=g, dtype=torch.float64)

    def run(x, index, count, weight):
        heads = ops.selected_projection(x, w, b, num_heads, index, count)
        return ops.selected_output_projection(heads, out, None, index, count, weight)

    expected = torch.stack([run(x[i], index[i], count[i], weight[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(run)(x, index, count, weight), expected)


@pytest.mark.parametrize("size", [(3, 130), (9, 1), (6, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, size):
    rand = Random(1, dtype)
    batch, length = size
    x, w, b, out = rand(batch, length, 72), rand(64, 72), rand(64), rand(40, 64)
    index, count, weight = rand.selection(batch, 4)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        heads = ops.selected_projection(x, w, b, 4, index, count)
        y = ops.selected_output_projection(heads, out, None, index, count, weight)
        results.append((heads, y, *torch.autograd.grad(y.square().sum(), [x, w, b, out, weight])))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, c in zip(results[0], other, strict=True):
            assert torch.equal(a, c)


X, W, B = torch.ones(2, 5, 6), torch.ones(12, 6), torch.ones(12)
HEADS, OUT, OUT_B = torch.ones(2, 3, 5, 4), torch.ones(6, 12), torch.ones(6)
INDEX, COUNT = torch.tensor([[0, 1, -1]] * 2).int(), torch.tensor([2, 2]).int()
PROJECTION = {"x": X, "weight": W, "bias": B, "num_heads": 3, "index": INDEX, "count": COUNT}
OUTPUT = {"heads": HEADS, "weight": OUT, "bias": OUT_B, "index": INDEX, "count": COUNT}


@pytest.mark.parametrize(
    ("operator", "changed", "error", "text"),
    [
        ("selected_projection", {"x": X[0]}, ValueError, r"x must be \[B, L, D\], got shape \[5, 6\]"),
        ("selected_projection", {"x": X.int()}, TypeError, "x must be float64, float32, bfloat16 or float16, got Int"),
        ("selected_projection", {"weight": W[:, :5]}, ValueError, r"weight must be \[H \* d, D\] with size 6 in dimension 1, got shape \[12, 5\]"),
        ("selected_projection", {"weight": W[0]}, ValueError, r"weight must be \[H \* d, D\], got shape \[6\]"),
        ("selected_projection", {"weight": W.double()}, TypeError, r"weight must have the dtype of x \(Float\), got Double"),
        ("selected_projection", {"bias": B[:5]}, ValueError, r"bias must be a vector with size 12 in dimension 0, got shape \[5\]"),
        ("selected_projection", {"num_heads": 5}, ValueError, r"num_heads must divide the rows of weight \(12\), got 5"),
        ("selected_projection", {"num_heads": -1}, ValueError, "num_heads must be in 0..65536, got -1"),
        ("selected_projection", {"num_heads": 2}, ValueError, "index must have at most num_heads = 2 columns"),
        ("selected_projection", {"index": INDEX[:1]}, ValueError, r"index must be \[B, K\] with size 2 in dimension 0"),
        ("selected_projection", {"index": INDEX.float()}, TypeError, "index must be int32 or int64, got Float"),
        ("selected_projection", {"index": INDEX + 2}, IndexError, "index must name heads between 0 and 2, got 3 for sequence 0"),
        ("selected_projection", {"count": COUNT + 2}, ValueError, "count must be between 0 and 3, got 4 for sequence 0"),
        ("selected_projection", {"index": INDEX * 0}, ValueError, "index must be ascending without repeats, got 0 before 0 for sequence 0"),
        ("selected_output_projection", {"heads": HEADS[0]}, ValueError, r"heads must be \[B, H, L, d\], got shape \[3, 5, 4\]"),
        ("selected_output_projection", {"weight": OUT[:, :5]}, ValueError, r"weight must be \[Dout, H \* d\] with size 12 in dimension 1"),
        ("selected_output_projection", {"weight": OUT.half()}, TypeError, r"weight must have the dtype of heads \(Float\), got Half"),
        ("selected_output_projection", {"bias": OUT_B[:2]}, ValueError, "bias must be a vector with size 6 in dimension 0"),
        ("selected_output_projection", {"head_weight": torch.ones(2, 2)}, ValueError, r"head_weight must be \[B, H\] with size 3 in dimension 1, got shape \[2, 2\]"),
        ("selected_output_projection", {"head_weight": INDEX}, TypeError, "head_weight must be float64, float32, bfloat16 or float16, got Int"),
        ("selected_output_projection", {"head_weight": torch.ones(2)}, ValueError, r"head_weight must be \[B, H\], got shape \[2\]"),
        ("selected_output_projection", {"index": INDEX - 1}, IndexError, "index must name heads between 0 and 2, got -1 for sequence 0"),
    ],
)  # fmt: skip
def test_bad_input(operator, changed, error, text):
    given = dict(PROJECTION if operator == "selected_projection" else OUTPUT) | changed
    with pytest.raises(error, match=text):
        getattr(ops, operator)(**given)


def test_bad_groups():
    with pytest.raises(ValueError, match=r"num_groups must divide num_heads \(3\), got 2"):
        ops.select_groups(INDEX, COUNT, 3, 2)
    with pytest.raises(ValueError, match=r"num_groups must divide num_heads \(3\), got 0"):
        ops.select_groups(INDEX, COUNT, 3, 0)
    with pytest.raises(ValueError, match="index must have at most num_heads = 2 columns"):
        ops.select_groups(INDEX, COUNT, 2, 1)
    with pytest.raises(IndexError, match="index must name heads between 0 and 2, got 4"):
        ops.select_groups(INDEX * 4, COUNT, 3, 1)
