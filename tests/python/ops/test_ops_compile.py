"""The attention operators under torch's transforms: opcheck, compile, export, autocast, vmap."""

import headwise  # noqa: F401
import pytest
import torch
from support import oracle
from support.operator_calls import (
    CASES,
    core_arguments,
    multihead_arguments,
    self_arguments,
)

ops = torch.ops.headwise


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    operator, arguments, options = CASES[name]
    leaves = [x for x in (*arguments, *options.values()) if torch.is_tensor(x) and x.requires_grad]
    places = [i for i, x in enumerate(arguments) if torch.is_tensor(x) and x.requires_grad]

    def run(*values):
        given = list(arguments)
        for i, value in zip(places, values[: len(places)], strict=True):
            given[i] = value
        given_options = dict(options)
        if len(values) > len(places):
            given_options["attn_mask"] = values[-1]
        return operator(*given, **given_options)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    operator, arguments, options = CASES[name]
    torch.library.opcheck(operator.default, arguments, options)


def test_internal_operators_pass_opcheck():
    with torch.no_grad():
        arguments = (*[detached(x) for x in self_arguments()], None, None, False, 0.0, None, None)
        forward = ops._selected_self_attention_forward
        # Slots that were not chosen hold whatever the memory held, so values are not compared.
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(forward.default, arguments, test_utils=tests)
        y, *saved = forward(*arguments)
        torch.library.opcheck(
            ops._selected_self_attention_backward.default,
            (torch.ones_like(y), *arguments, *saved, [True, False, True, True, True, True, False]),
            test_utils=tests,
        )


def detached(x):
    return x.detach() if torch.is_tensor(x) else x


def test_second_derivative_says_that_there_is_none():
    arguments = self_arguments()
    y = ops.selected_self_attention(*arguments)
    (gradient,) = torch.autograd.grad(y.sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for .*_selected_self_attention_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["self masked", "multihead", "core"])
def test_compile_fullgraph(name, dynamic):
    operator, arguments, options = CASES[name]
    compiled = torch.compile(
        lambda *a, **o: operator(*a, **o) * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
    y, expected = compiled(*arguments, **options), operator(*arguments, **options) * 2
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments, **options), expected)


def test_compile_inductor():
    arguments = self_arguments(torch.float32)
    compiled = torch.compile(lambda *a: ops.selected_self_attention(*a).sin(), fullgraph=True)
    y, expected = compiled(*arguments), ops.selected_self_attention(*arguments).sin()
    torch.testing.assert_close(y, expected)
    (got,) = torch.autograd.grad(y.sum(), arguments[1])
    # Inductor's cosine differs in the last bits, and the gradient multiplies it: 1.4e-5 was seen.
    want = torch.autograd.grad(expected.sum(), arguments[1])[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, *weights, _, _, _, _ = self_arguments(torch.float32)
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x, index, count, weight):
        return ops.selected_self_attention(x, *self.weights, 3, index, count, weight)


def test_export_with_a_dynamic_batch_and_length():
    layer = Layer()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    x, *_, index, count, weight = self_arguments(torch.float32)
    weight = weight.detach()
    program = torch.export.export(
        layer,
        (x.detach(), index, count, weight),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}, {0: batch}),
    )
    x, *_, index, count, weight = self_arguments(torch.float32, batch=4, length=9)
    torch.testing.assert_close(
        program.module()(x, index, count, weight), layer(x, index, count, weight)
    )


@pytest.mark.parametrize("name", ["self", "multihead", "core"])
def test_autocast(name):
    operator = CASES[name][0]
    make = {"self": self_arguments, "multihead": multihead_arguments, "core": core_arguments}[name]
    arguments = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator(*arguments)
    assert y.dtype == torch.bfloat16
    low = [
        x.detach().bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in arguments
    ]
    place = 5 if name == "core" else 8 if name == "self" else 14
    low[place] = arguments[place]
    torch.testing.assert_close(y, operator(*low))
    leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.float().sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype and torch.isfinite(gradient).all()


def test_vmap():
    """A second batch dimension: torch falls back to a loop."""
    _, *weights, num_heads, _, _, _ = (detached(x) for x in self_arguments())
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 5, 6, generator=g, dtype=torch.float64)
    selections = [oracle.random_selection(2, 3, g, dtype=torch.float64) for _ in range(3)]
    index, count, weight = (torch.stack(t) for t in zip(*selections, strict=True))

    def run(x, index, count, weight):
        return ops.selected_self_attention(x, *weights, num_heads, index, count, weight)

    expected = torch.stack([run(x[i], index[i], count[i], weight[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(run)(x, index, count, weight), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_widths_of_blas_differ_by_rounding_with_the_number_of_threads(dtype, tolerance, threads):
    """Heads whose width is not a multiple of 8 go through BLAS: equal but for rounding."""
    torch.manual_seed(0)
    heads, width, batch = 4, 20, 3
    x = torch.randn(batch, 70, 36).to(dtype).requires_grad_()
    w = torch.randn(3 * heads * width, 36).div(6).to(dtype).requires_grad_()
    out = torch.randn(36, heads * width).div(9).to(dtype).requires_grad_()
    index = torch.tensor([[0, 1, -1, -1], [0, 2, 3, -1], [1, -1, -1, -1]], dtype=torch.int32)
    count, weight = torch.tensor([2, 3, 1], dtype=torch.int32), torch.ones(batch, heads)
    results = []
    for n in (1, 2):
        threads(n)
        y = ops.selected_self_attention(x, w, None, out, None, heads, index, count, weight)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, w, out])))
    for one, two in zip(*results, strict=True):
        scale = one.abs().max().item()
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance * scale)


def test_functional_call_and_deterministic():
    """The same inputs give the same bits, whatever the number of threads."""
    arguments = self_arguments(torch.float32, batch=3, length=130)
    leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        y = ops.selected_self_attention(*arguments)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
