"""Gradients of attention where scores are large, in every dtype and width, against float64.

The scores of a backward pass are computed again from what the forward pass kept. Were that rounded
after the forward pass had used it, an exponential of thousands would turn the difference into any
number.
"""

import math

import headwise  # noqa: F401  registers the operators
import pytest
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rounded(x, dtype):
    """x as it is stored in dtype; the gradient passes."""
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def plain(x, weight, out_weight, heads, head_weight, dtype, mask, padding, causal, keep):
    """Every head in float64; queries, keys and values as dtype stores them."""
    batch, length, _ = x.shape
    parts = rounded(x @ weight.T, dtype).chunk(3, -1)
    q, k, v = (p.view(batch, length, heads, -1).transpose(1, 2) for p in parts)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if mask is not None:
        scores = scores + mask
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    if causal:
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    p = scores.softmax(-1)
    if keep is not None:
        p = p * keep
    context = (p @ v) * head_weight[:, :, None, None]
    return context.transpose(1, 2).flatten(2) @ out_weight.T


def dropout_mask(batch, heads, length, seed, p):
    """The operator's factors of probabilities, read from one-hot values."""
    q = torch.zeros(batch, heads, length, 1).double()
    k, v = torch.zeros_like(q), torch.eye(length).double().expand(batch, heads, -1, -1)
    index = torch.arange(heads).expand(batch, -1).contiguous()
    count = torch.full((batch,), heads)
    return length * torch.ops.headwise.selected_attention(
        q, k, v.contiguous(), index, count, dropout_p=p, dropout_seed=seed
    )


CASES = [
    (dtype, case, scale)
    for dtype in DTYPES
    for case in ("plain", "mask", "padding", "causal", "dropout")
    for scale in (1.0, 30.0, 300.0, 1000.0)
]


@pytest.mark.parametrize(("dtype", "case", "scale"), CASES)
@pytest.mark.parametrize("width", [4, 6, 8, 16])
def test_gradients_of_the_layer(dtype, width, case, scale):
    torch.manual_seed(0)
    batch, length, heads, d = 2, 9, 3, 12
    e = heads * width
    x = torch.randn(batch, length, d)
    weight = torch.randn(3 * e, d) / math.sqrt(d)
    # Scores grow with scale, values do not.
    weight[: 2 * e] *= math.sqrt(scale)
    out_weight = torch.randn(d, e) / math.sqrt(e)
    head_weight = torch.rand(batch, heads) + 0.5
    mask = torch.randn(length, length) * scale if case == "mask" else None
    padding = torch.zeros(batch, length, dtype=torch.bool) if case == "padding" else None
    if padding is not None:
        padding[1, 5:] = True
    seed = torch.tensor([11]) if case == "dropout" else None
    keep = dropout_mask(batch, heads, length, seed, 0.4).double() if case == "dropout" else None
    cotangent = torch.randn(batch, length, d)
    given = [t.to(dtype) for t in (x, weight, out_weight, head_weight)]
    mask = None if mask is None else mask.to(dtype)

    own = [t.clone().requires_grad_() for t in given]
    index = torch.arange(heads).expand(batch, -1).contiguous()
    y = torch.ops.headwise.selected_self_attention(
        own[0], own[1], None, own[2], None, heads, index, torch.full((batch,), heads), own[3],
        padding, mask, case == "causal", 0.4 if case == "dropout" else 0.0, seed,
    )  # fmt: skip
    (y.double() * cotangent).sum().backward()

    exact = [t.double().requires_grad_() for t in given]
    expected = plain(
        exact[0], exact[1], exact[2], heads, exact[3], dtype,
        None if mask is None else mask.double(), padding, case == "causal", keep,
    )  # fmt: skip
    (expected * cotangent.to(dtype).double()).sum().backward()

    # PyTorch's own operators in the same dtype: what rounding alone does.
    usual = [t.detach().clone().requires_grad_() for t in given]
    output = plain(
        usual[0], usual[1], usual[2], heads, usual[3], dtype, mask, padding, case == "causal",
        None if keep is None else keep.to(dtype),
    )  # fmt: skip
    (output * cotangent.to(dtype)).sum().backward()

    eps = torch.finfo(dtype).eps
    # An exponential turns an absolute error of the scores into a relative one of probabilities;
    # sums are float32 for the narrow types.
    largest = float((exact[0] @ exact[1].T).abs().amax() ** 2) * math.sqrt(width)
    slack = 8 * eps + 64 * largest * min(eps, torch.finfo(torch.float32).eps)
    for name, mine, theirs, rounding in zip(
        ("x", "in_proj_weight", "out_proj_weight", "weight"), own, exact, usual, strict=True
    ):
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        usual_error = (rounding.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < max(slack, 3 * usual_error), (name, float(error), slack, float(usual_error))
    error = (y.double() - expected).norm() / expected.norm()
    assert error < slack, ("output", float(error), slack)


@pytest.mark.parametrize(
    ("dtype", "width", "reach"),
    [
        (dtype, width, reach)
        for dtype, width in ((torch.bfloat16, 12), (torch.bfloat16, 16), (torch.float16, 16))
        for reach in (3e3, 1.2e4, 3.6e4)
    ],
)
def test_the_gradient_does_not_grow_with_the_scores(dtype, width, reach):
    """Softmax of large scores is nearly one-hot: gradients shrink. They must never explode."""
    torch.manual_seed(1)
    heads, length, d = 2, 16, 24
    x = torch.randn(4, length, d).to(dtype)
    weight = torch.randn(3 * heads * width, d)
    q, k, _ = (x.float() @ weight.T).chunk(3, -1)
    now = (q @ k.transpose(1, 2)).abs().amax() / math.sqrt(width)
    weight[: 2 * heads * width] *= math.sqrt(reach / now)
    out_weight = torch.randn(d, heads * width).to(dtype)
    weight = weight.to(dtype).requires_grad_()
    index = torch.arange(heads).expand(4, -1).contiguous()
    y = torch.ops.headwise.selected_self_attention(
        x, weight, None, out_weight, None, heads, index, torch.full((4,), heads),
        torch.ones(4, heads, dtype=dtype),
    )  # fmt: skip
    y.float().square().mean().backward()
    exact = weight.detach().double().requires_grad_()
    expected = plain(
        x.double(), exact, out_weight.double(), heads, torch.ones(4, heads).double(), dtype,
        None, None, False, None,
    )  # fmt: skip
    expected.square().mean().backward()
    assert weight.grad.isfinite().all()
    assert 0.5 < weight.grad.double().norm() / exact.grad.norm() < 2


def error_of_gradients(dtype, width, form, reach, seed):
    """Relative errors of the operator's gradients and of those of PyTorch's attention."""
    heads, length = 3, 9
    d = heads * width
    torch.manual_seed(seed)
    x, cotangent = torch.randn(2, length, d).to(dtype), torch.randn(2, length, d).to(dtype)
    weight = torch.randn(3 * d, d)
    q, k, _ = (x.float() @ weight.T).unflatten(-1, (3, heads, width)).transpose(1, 3).unbind(2)
    now = float((q @ k.transpose(2, 3)).abs().amax()) / math.sqrt(width)
    weight[: 2 * d] *= math.sqrt(reach / now)
    weight = weight.to(dtype)
    out_weight = (torch.randn(d, d) / math.sqrt(d)).to(dtype)
    head_weight = (torch.rand(2, heads) + 0.5).to(dtype)
    index, count = torch.arange(heads).expand(2, -1).contiguous(), torch.full((2,), heads)

    def split(x, weight):
        parts = (x @ weight.T).unflatten(-1, (3, heads, width))
        return [part.transpose(1, 2) for part in parts.unbind(2)]

    def own(x, weight):
        if form == "layer":
            return torch.ops.headwise.selected_self_attention(
                x, weight, None, out_weight, None, heads, index, count, head_weight
            )
        y = torch.ops.headwise.selected_attention(*split(x, weight), index, count, head_weight)
        return y.transpose(1, 2).flatten(2) @ out_weight.T

    def torchs(x, weight):
        y = torch.nn.functional.scaled_dot_product_attention(*split(x, weight))
        return (y * head_weight[:, :, None, None]).transpose(1, 2).flatten(2) @ out_weight.T

    def exact(x, weight):
        return plain(
            x, weight, out_weight.double(), heads, head_weight.double(), dtype,
            None, None, False, None,
        )  # fmt: skip

    gradients = []
    for function, precision in ((exact, torch.float64), (own, dtype), (torchs, dtype)):
        leaves = [t.detach().clone().to(precision).requires_grad_() for t in (x, weight)]
        (function(*leaves) * cotangent.to(precision)).sum().backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    return [
        max(
            float((mine - right).norm() / right.norm())
            for mine, right in zip(gradient, gradients[0], strict=True)
        )
        for gradient in gradients[1:]
    ]


@pytest.mark.parametrize("reach", [3e2, 3e3, 3.6e4])
@pytest.mark.parametrize("form", ["layer", "core"])
@pytest.mark.parametrize("width", [8, 12, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_torchs_attention(dtype, width, form, reach):
    """With any gradient of the output and heads of different weights: where one probability is
    nearly 1, the terms of a score's gradient must cancel."""
    errors = [error_of_gradients(dtype, width, form, reach, seed) for seed in range(4)]
    mine, theirs = torch.tensor(errors).amax(0).tolist()
    assert mine < 4 * theirs, errors


@pytest.mark.parametrize("scale", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize("width", [5, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_core(dtype, width, scale):
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 4, 10, width).to(dtype) for _ in range(3))
    q = (q.double() * math.sqrt(scale)).to(dtype)
    k = (k.double() * math.sqrt(scale)).to(dtype)
    index, count = torch.arange(4).expand(2, -1).contiguous(), torch.full((2,), 4)
    cotangent = torch.randn(2, 4, 10, width).to(dtype)
    own = [t.clone().requires_grad_() for t in (q, k, v)]
    y = torch.ops.headwise.selected_attention(*own, index, count)
    (y * cotangent).sum().backward()
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(2, 3) / math.sqrt(width)
    ((scores.softmax(-1) @ exact[2]) * cotangent.double()).sum().backward()
    eps = torch.finfo(dtype).eps
    slack = 8 * eps + 16 * float(scores.abs().amax()) * min(eps, 2**-23)
    for mine, theirs in zip(own, exact, strict=True):
        size = max(float(theirs.grad.norm()), math.sqrt(scale) * eps)
        # Gradients that vanish leave the rounding errors of their terms.
        least = 64 * min(eps, 2**-23) * math.sqrt(scale)
        assert float((mine.grad.double() - theirs.grad).norm()) < max(slack * size, least)
