"""Operators check inconsistent arguments, and second derivatives. All of them can be called
directly, private ones too, so none trusts its arguments.
"""

import math
import random

import pytest
import torch
from support import adversaries
from torch.autograd.gradcheck import GradcheckError, gradgradcheck

ops = torch.ops.headwise
HEADS, WIDTH, LENGTH, BATCH = 3, 4, 5, 2


def arguments_of(schema, seed=0):
    rng = random.Random(seed)
    operator = schema.name.removeprefix("headwise::")
    return {a.name: adversaries._argument(rng, operator, a, False) for a in schema.arguments}


SELECTING = [
    schema
    for schema in adversaries.SCHEMAS
    if {"index", "count"} <= {a.name for a in schema.arguments}
]


@pytest.mark.parametrize("schema", SELECTING, ids=lambda schema: schema.name)
@pytest.mark.parametrize("wrapped", [2**33 + 1, -(2**32) + 1, 2**32 + 1, 2**63 - 1, -(2**63) + 1])
def test_selections_do_not_wrap_around(schema, wrapped):
    """Each of these is 1, or 0, or -1, where only 32 bits of it are kept."""
    operator = getattr(ops, schema.name.removeprefix("headwise::"))
    for name, place in (("index", (0, 1)), ("count", (0,))):
        arguments = arguments_of(schema)
        if schema.name == "headwise::selection_mask":
            arguments["dtype"] = torch.float32
        arguments[name] = arguments[name].clone()
        arguments[name][place] = wrapped
        with pytest.raises((ValueError, IndexError)):
            operator(**arguments)


@pytest.mark.parametrize("wrapped", [2**33 + 1, -(2**32) + 1, 2**63 - 1])
def test_counts_do_not_wrap_around(wrapped):
    count = torch.tensor([wrapped, 1])
    relevance = torch.rand(2, 3)
    with pytest.raises(ValueError, match="count must lie in"):
        ops.select_heads(relevance, count)
    index = torch.arange(3).expand(2, -1).contiguous()
    with pytest.raises(ValueError, match="count must"):
        ops.share_heads(index, count, torch.rand(2, 3), relevance, torch.tensor([1]))


def layer_inputs(dtype=torch.float32):
    e = HEADS * WIDTH
    index = torch.arange(HEADS).expand(BATCH, -1).contiguous()
    return {
        "self": (
            torch.randn(BATCH, LENGTH, e, dtype=dtype),
            torch.randn(3 * e, e, dtype=dtype),
            None,
            torch.randn(e, e, dtype=dtype),
            None,
            HEADS,
            index,
            torch.tensor([2, 3]),
            torch.rand(BATCH, HEADS, dtype=dtype),
            None,
            None,
            False,
            0.0,
            None,
            None,
        ),
        "core": (
            *(torch.randn(BATCH, HEADS, LENGTH, WIDTH, dtype=dtype) for _ in range(3)),
            index,
            torch.tensor([2, 3]),
            torch.rand(BATCH, HEADS, dtype=dtype),
            None,
            None,
            False,
            0.0,
            None,
            None,
        ),
    }


def broken(saved):
    yield torch.empty(0, dtype=saved.dtype), ValueError
    yield saved[:1] if saved.shape[0] > 1 else saved[:0], ValueError
    yield saved.unsqueeze(0), ValueError
    yield saved.new_empty([*saved.shape[:-1], saved.shape[-1] + 1]), ValueError
    yield saved.to(torch.float64 if saved.dtype != torch.float64 else torch.float32), TypeError


@pytest.mark.parametrize("route", ["selected", "aten"])
@pytest.mark.parametrize("kind", ["self", "core"])
def test_backward_operators_check_what_forward_kept(route, kind):
    torch.manual_seed(0)
    name = "self_attention" if kind == "self" else "attention"
    forward = getattr(ops, f"_{route}_{name}_forward")
    backward = getattr(ops, f"_{route}_{name}_backward")
    inputs = layer_inputs()[kind]
    output, *kept = forward(*inputs)
    if kind == "core":
        kept = [output, *kept]
    needs = [True] * (7 if kind == "self" else 5)
    needs[-1] = False  # no mask
    given = [torch.ones_like(output), *inputs, *kept]
    gradients = backward(*given, needs)
    assert all(g.isfinite().all() for g in gradients)
    for place in (0, *range(len(inputs) + 1, len(given))):
        for wrong, error in broken(given[place]):
            with pytest.raises(error, match=r"must (have shape|be )"):
                backward(*given[:place], wrong, *given[place + 1 :], needs)


@pytest.mark.parametrize("operator", ["projection", "output_projection"])
def test_projection_backward_checks_its_gradient(operator):
    e = HEADS * WIDTH
    index, count = torch.arange(HEADS).expand(BATCH, -1).contiguous(), torch.tensor([2, 3])
    for route in ("selected", "aten"):
        backward = getattr(ops, f"_{route}_{operator}_backward")
        if operator == "projection":
            x, weight = torch.randn(BATCH, LENGTH, 7), torch.randn(e, 7)
            grad = torch.randn(BATCH, HEADS, LENGTH, WIDTH)
            call = lambda g: backward(g, x, weight, HEADS, index, count, [True] * 3)  # noqa: B023, E731
        else:
            x, weight = torch.randn(BATCH, HEADS, LENGTH, WIDTH), torch.randn(7, e)
            grad = torch.randn(BATCH, LENGTH, 7)
            call = lambda g: backward(g, x, weight, index, count, None, [True, True, True, False])  # noqa: B023, E731
        call(grad)
        for wrong, error in broken(grad):
            with pytest.raises(error, match="grad_output must"):
                call(wrong)


def test_numbers_of_draws_and_sizes_have_limits():
    scores = torch.rand(2, 5)
    for call in (
        lambda n: ops.rank_agreement(scores, resamples=n),
        lambda n: ops.paired_bootstrap(scores, resamples=n),
        lambda n: ops.share_interval(scores, torch.ones(2, 5), resamples=n),
        lambda n: ops.selection_association(scores.round(), torch.rand(2), permutations=n),
        lambda n: ops.selection_information(
            scores.round(), torch.tensor([0, 1]), 2, permutations=n
        ),
    ):
        for draws in (0, -1, 10**12, 2**62):
            with pytest.raises(ValueError, match=r"must be in 1\.\.10000000"):
                call(draws)
    index, count = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_heads must be in 0\.\.65536"):
        ops.select_groups(index, count, 2**40, 2**40)
    with pytest.raises(ValueError, match=r"num_heads must be in 0\.\.65536"):
        ops.routed_first(torch.tensor([0]), 2**40)
    with pytest.raises(ValueError, match=r"classes must be in 0\.\.65536"):
        ops.selection_information(scores.round(), torch.tensor([0, 1]), 2**40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 5, 17])
def test_a_weight_that_is_not_a_number_shows(dtype, width, length):
    torch.manual_seed(0)
    e = HEADS * width
    x, weight = torch.randn(2, length, e), torch.randn(3 * e, e)
    out_weight, head_weight = torch.randn(e, e), torch.ones(2, HEADS)
    head_weight[1, 1] = math.nan
    x, weight, out_weight, head_weight = (t.to(dtype) for t in (x, weight, out_weight, head_weight))
    index, count = torch.arange(HEADS).expand(2, -1).contiguous(), torch.tensor([2, 2])
    for run in (ops.selected_self_attention, ops._aten_self_attention_forward):
        more = () if run is ops.selected_self_attention else (None, None, False, 0.0, None, None)
        y = run(x, weight, None, out_weight, None, HEADS, index, count, head_weight, *more)
        y = y if isinstance(y, torch.Tensor) else y[0]
        assert y[1].isnan().all() and y[0].isfinite().all()
    trained = [t.clone().requires_grad_() for t in (x, weight, out_weight, head_weight)]
    y = ops.selected_self_attention(
        trained[0], trained[1], None, trained[2], None, HEADS, index, count, trained[3]
    )
    assert y[1].isnan().all()
    y.sum().backward()
    assert trained[0].grad[1].isnan().all() and trained[0].grad[0].isfinite().all()
    q, k, v = (torch.randn(2, HEADS, length, width).to(dtype) for _ in range(3))
    y = ops.selected_attention(q, k, v, index, count, head_weight)
    assert y[1, 1].isnan().all() and y[1, 0].isfinite().all()
    y = ops.selected_output_projection(q, out_weight, None, index, count, head_weight)
    assert y[1].isnan().all() and y[0].isfinite().all()
    y = ops.combine_heads(q, head_weight, out_weight, None)
    assert y[1].isnan().all()


# --- second derivatives: right, or refused --------------------------------------------------------


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def given(values):
    return values.double().clone().requires_grad_()


SCORES = torch.tensor([[0.3, -0.2, 0.9, 0.1], [0.5, 0.4, -1.0, 0.2]], dtype=torch.float64)
TAU, NOW = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
UNIFORM = torch.tensor([[0.3, 0.6, 0.5, 0.4], [0.7, 0.2, 0.5, 0.45]], dtype=torch.float64)
CHOSEN = (torch.arange(HEADS).expand(BATCH, -1).contiguous(), torch.tensor([2, 3]))

SMOOTH = {
    "soft_top_k": (
        lambda s, m: ops.soft_top_k(s, m, TAU),
        lambda: (given(SCORES), given(torch.tensor([1.3, 2.2]))),
    ),
    "soft_top_k, cold": (
        lambda s: ops.soft_top_k(s, torch.tensor([1.5, 2.5]).double(), TAU / 4),
        lambda: (given(SCORES),),
    ),
    "budget_select": (
        lambda s, b: ops.budget_select(
            s, b, NOW, None, True, True, 0.5, 0.1, 0.0, 0.8, False, False, 1, "round"
        )[2],
        lambda: (given(SCORES), given(torch.tensor([0.3, 0.6]))),
    ),
    "masked_mean": (lambda x: ops.masked_mean(x), lambda: (drawn(2, 3, 4),)),
    "hard_concrete": (
        lambda a: ops.hard_concrete(a, UNIFORM),
        lambda: ((SCORES / 4).requires_grad_(),),
    ),
    "hard_concrete_open": (ops.hard_concrete_open, lambda: (drawn(2, 4),)),
    "gumbel_sigmoid_select": (
        lambda a: ops.gumbel_sigmoid_select(a, UNIFORM, NOW, True, True, 0.8, 0.7)[2],
        lambda: (given(SCORES),),
    ),
    "standardize": (
        lambda f: ops.standardize(f, torch.zeros(3).double(), torch.ones(3).double()),
        lambda: (drawn(2, 3),),
    ),
    "input_relevance": (
        lambda f, b, w: ops.input_relevance(f, b, w, NOW, True, 0.2),
        lambda: (drawn(2, 3), drawn(4), drawn(4, 3)),
    ),
    "head_budget": (
        lambda f, w, b, o, c: ops.head_budget(
            f, w, b, o, c, NOW, True, 0.01, 0.99, 0.5, 0.9, 0.1, 0.0
        )[0],
        lambda: (drawn(2, 3), drawn(5, 3), drawn(5), drawn(1, 5), drawn(1)),
    ),
    "subset_sample": (
        lambda s: ops.subset_sample(s, 2, TAU * 2),
        lambda: (given(SCORES[0]),),
    ),
    "relevance_entropy": (ops.relevance_entropy, lambda: (drawn(2, 4),)),
    "budget_bounds": (
        lambda a: ops.budget_bounds(a, 0.2, 0.8),
        lambda: (torch.tensor([0.1, 0.95, 0.5]).double().requires_grad_(),),
    ),
    "target_penalty": (
        lambda e: ops.target_penalty([e], [4], NOW, 0.5, 0.9, 0.1, 20.0, "squared"),
        lambda: (drawn(3),),
    ),
    "target_penalty, lagrangian": (
        lambda e: ops.target_penalty(
            [e], [4], NOW, 0.5, 0.9, 0.1, 20.0, "lagrangian", torch.tensor([0.7, -0.4]).double()
        ),
        lambda: (drawn(3),),
    ),
    "sparsity_penalty": (
        lambda size: ops.sparsity_penalty(
            size, 3.0, NOW, 0.5, 0.1, torch.tensor([0.7, -0.4]).double()
        ),
        lambda: (torch.tensor(2.2).double().requires_grad_(),),
    ),
    "masked_layer_norm": (
        lambda x, w, b: ops.masked_layer_norm(x, torch.tensor([1, 0, 0.5]).double(), w, b),
        lambda: (drawn(2, 3), drawn(3), drawn(3)),
    ),
    "dense_attention": (
        lambda q, k, v: ops.dense_attention(q, k, v),
        lambda: (drawn(1, 2, 3, 4), drawn(1, 2, 3, 4), drawn(1, 2, 3, 4)),
    ),
    "attention_probabilities": (
        lambda q, k: ops.attention_probabilities(q, k),
        lambda: (drawn(1, 2, 3, 4), drawn(1, 2, 3, 4)),
    ),
    "hybrid_attention": (
        lambda q, k, v: ops.hybrid_attention(q, k, v),
        lambda: (drawn(1, 2, 3, 4), drawn(1, 2, 3, 4), drawn(1, 2, 3, 4)),
    ),
    "combine_heads": (
        lambda c, w, o: ops.combine_heads(c, w, o, None),
        lambda: (drawn(2, 3, 2, 2), drawn(2, 3), drawn(4, 6)),
    ),
    "prediction_confidence": (
        lambda x: ops.prediction_confidence(x, "entropy"),
        lambda: (drawn(2, 4),),
    ),
    "causal_penalty": (lambda x: ops.causal_penalty(x, 0.5, 3.0), lambda: (drawn(4),)),
    "selected_self_attention": (
        lambda x, w, o: ops.selected_self_attention(
            x, w, None, o, None, HEADS, *CHOSEN, torch.ones(BATCH, HEADS).double()
        ),
        lambda: (drawn(BATCH, 2, 5), drawn(3 * HEADS * 2, 5), drawn(5, HEADS * 2)),
    ),
    "selected_multihead_attention": (
        lambda x, w, o: ops.selected_multihead_attention(
            x, x, x, w, w, w, None, None, None, o, None, HEADS, *CHOSEN,
            torch.ones(BATCH, HEADS).double(),
        ),
        lambda: (drawn(BATCH, 2, 5), drawn(HEADS * 2, 5), drawn(5, HEADS * 2)),
    ),
    "selected_attention": (
        lambda q, k, v: ops.selected_attention(q, k, v, *CHOSEN),
        lambda: tuple(drawn(BATCH, HEADS, 2, 2) for _ in range(3)),
    ),
    "selected_projection": (
        lambda x, w: ops.selected_projection(x, w, None, HEADS, *CHOSEN),
        lambda: (drawn(BATCH, 2, 5), drawn(HEADS * 2, 5)),
    ),
    "selected_output_projection": (
        lambda h, w: ops.selected_output_projection(h, w, None, *CHOSEN),
        lambda: (drawn(BATCH, HEADS, 2, 2), drawn(5, HEADS * 2)),
    ),
}  # fmt: skip

#: Their backward passes are kernels, which have no derivative.
REFUSED = {name for name in SMOOTH if name.startswith("selected")}


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_right_or_refused(name):
    torch.manual_seed(0)
    function, inputs = SMOOTH[name]
    try:
        assert gradgradcheck(function, inputs(), check_fwd_over_rev=False)
        refused = False
    except GradcheckError:
        raise
    except RuntimeError as error:
        assert "not implemented" in str(error) or "derivative" in str(error)
        refused = True
    if name in REFUSED:
        assert refused


def test_what_is_held_has_the_derivatives_of_a_linear_map():
    """LRP holds slopes and variances constant: the first derivative is theirs, the second 0."""
    x, other = drawn(2, 5), torch.randn(2, 5, dtype=torch.float64)
    weight, bias = torch.randn(5, dtype=torch.float64), drawn(5)
    centred = (x - x.mean(-1, keepdim=True)).detach()
    scale = weight * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    slope = other / x.detach()
    cases = [
        (ops.held_slope(x, other), slope * x),
        (
            ops.held_layer_norm(x, weight, bias, 1e-5),
            (x - x.mean(-1, keepdim=True)) * scale + bias,
        ),
    ]
    up = torch.randn(2, 5, dtype=torch.float64)
    for y, linear in cases:
        # Of a loss that is not linear: its own second derivative stays.
        results = []
        for output in (y, linear):
            (first,) = torch.autograd.grad((output.pow(3) * up).sum(), x, create_graph=True)
            results += [first, torch.autograd.grad((first * up).sum(), x)[0]]
        torch.testing.assert_close(results[:2], results[2:])


def test_the_gradient_of_soft_top_k_is_that_of_the_implicit_function():
    """d w = w (1 - w) / tau (d s - d t), where the sum of d w is the change of the mass."""
    scores = given(SCORES)
    mass = torch.tensor([1.3, 2.2]).double().requires_grad_()
    w = ops.soft_top_k(scores, mass, TAU)
    torch.testing.assert_close(w.sum(1), mass, rtol=0, atol=1e-10)
    up = torch.randn(2, 4, dtype=torch.float64)
    (w * up).sum().backward()
    slope = w * (1 - w) / TAU
    mean = (slope * up).sum(1, keepdim=True) / slope.sum(1, keepdim=True)
    torch.testing.assert_close(scores.grad, slope * (up - mean))
    torch.testing.assert_close(mass.grad, mean.squeeze(1))


@pytest.mark.parametrize("route", ["selected", "aten"])
@pytest.mark.parametrize("kind", ["self", "multihead", "core"])
def test_arguments_that_were_not_given_have_no_gradient(route, kind):
    """Asked for all gradients, a backward operator gives those of the arguments that there are."""
    torch.manual_seed(0)
    x, w, o = torch.randn(2, 4, 6), torch.randn(18, 6), torch.randn(6, 6)
    heads = (torch.tensor([[0, 2, -1], [0, 1, 2]]), torch.tensor([2, 3]))
    weight = torch.rand(2, 3)
    masks = (None, None, False, 0.0, None, None)
    if kind == "self":
        name, arguments = "self_attention", (x, w, None, o, None, 3, *heads, weight, *masks)
    elif kind == "multihead":
        weights = (*w.chunk(3), None, None, None, o, None)
        arguments = (x, x, x, *weights, 3, *heads, weight, None, None, False, *masks)
        name = "multihead_attention"
    else:
        q = torch.randn(2, 3, 4, 2)
        name, arguments = "attention", (q, q, q, *heads, None, *masks)
    forward = getattr(torch.ops.headwise, f"_{route}_{name}_forward")
    backward = getattr(torch.ops.headwise, f"_{route}_{name}_backward")
    output, *saved = forward(*arguments)
    kept = [output, *saved] if kind == "core" else saved
    names = [result.name for result in backward.default._schema.returns]
    gradients = backward(torch.ones_like(output), *arguments, *kept, [True] * len(names))
    given = {a.name: v for a, v in zip(forward.default._schema.arguments, arguments, strict=True)}
    for name, gradient in zip(names, gradients, strict=True):
        argument = given[name.removeprefix("grad_")]
        expected = 0 if argument is None else argument.numel()
        assert gradient.numel() == expected, name
        assert bool(gradient.isfinite().all()), name
