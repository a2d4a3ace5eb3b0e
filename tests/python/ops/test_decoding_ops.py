"""What decoders do around attention: rotations, causal masks, hidden tokens, slots of caches."""

import io
import itertools

import pytest
import torch
from headwise.nn.decoder_inputs import align, hide
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.headwise
SIZES = st.integers(1, 4)


def angles(rows, length, width, dtype=torch.float32):
    """Cosines and sines [rows, L, r] whose two halves are equal."""
    turns = torch.rand(rows, length, width // 2, dtype=torch.float64) * 6
    turns = torch.cat([turns, turns], dim=-1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def turned(heads, cos, sin, neighbours):
    """The rotation as a product of complex numbers, of the first r features."""
    width = cos.size(-1)
    own, rest = heads[..., :width].double(), heads[..., width:].double()
    first, second = (own[..., ::2], own[..., 1::2]) if neighbours else own.chunk(2, dim=-1)
    angle = torch.complex(*(table.double()[:, None, :, : width // 2] for table in (cos, sin)))
    product = torch.complex(first, second) * angle
    parts = (product.real, product.imag)
    both = torch.stack(parts, dim=-1).flatten(-2) if neighbours else torch.cat(parts, dim=-1)
    return torch.cat([both, rest], dim=-1)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.sampled_from([0, 2, 4, 6]), st.integers(0, 3), st.booleans(),
       st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))  # fmt: skip
def test_rotations_are_products_of_complex_numbers(batch, heads, length, width, more, same, dtype):
    x = torch.randn(batch, heads, length, width + more, dtype=dtype)
    cos, sin = angles(1 if same else batch, length, width, dtype)
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for neighbours in (False, True):
        # Neighbours share an angle, which then occurs twice in a row.
        tables = [t[..., : width // 2].repeat_interleave(2, -1) for t in (cos, sin)]
        got = ops.rotate_heads(x, *(tables if neighbours else (cos, sin)), neighbours)
        expected = turned(x, cos, sin, neighbours)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=loose, atol=loose)


def unseen(length, keys, window):
    """Which key each query must not see, one by one."""
    mask = torch.zeros(length, keys, dtype=torch.bool)
    for query, key in itertools.product(range(length), range(keys)):
        own = keys - length + query
        mask[query, key] = key > own or (window is not None and key <= own - window)
    return mask


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 4), st.none() | st.integers(1, 9), st.booleans(),
       st.sampled_from([None, torch.bool, torch.float32]))  # fmt: skip
def test_aligned_masks_hide_what_causal_queries_must_not_see(length, past, window, causal, kind):
    q, k = torch.randn(2, 3, length, 4), torch.randn(2, 3, length + past, 4)
    given_mask, added = None, torch.zeros(length, length + past)
    if kind is not None:
        hidden = torch.rand(length, length + past) < 0.3
        given_mask = hidden if kind == torch.bool else torch.randn(hidden.shape)
        added = added.masked_fill(hidden, -torch.inf) if kind == torch.bool else given_mask
    if causal:
        added = added.masked_fill(unseen(length, length + past, window), -torch.inf)
    masks = align(q, k, None, given_mask, causal, window)
    assert not masks.is_causal or (past == 0 and masks.attn_mask is None)
    plain = (q @ k.transpose(2, 3) / 2 + added).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(ops.attention_probabilities(q, k, *masks), plain)


def test_hidden_tokens():
    x = torch.randn(2, 4, 3)
    padding = torch.tensor([[True, False, False, False], [False, False, False, False]])
    seen = torch.tensor([[True, True, False, True], [False, True, True, True]])
    floating = torch.zeros(2, 4).masked_fill(padding, -torch.inf)
    assert hide(padding, None, x) is padding
    for given_padding in (padding, floating):
        assert hide(given_padding, seen, x).tolist() == (padding | ~seen).tolist()
        first = [[True, False, False, True], [False, False, True, True]]
        assert hide(given_padding, 2, x).tolist() == first
    assert hide(None, 3, x).tolist() == [[False, False, False, True]] * 2
    with pytest.raises(ValueError, match=r"gates_see must have shape \[2, 4\], as .* got \[2, 3\]"):
        hide(None, seen[:, :3], x)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.lists(SIZES, max_size=2), st.data())
def test_slots_hold_the_groups_that_were_chosen(batch, groups, more, data):
    kept = [data.draw(st.sets(st.integers(0, groups - 1))) for _ in range(batch)]
    index = torch.tensor([(sorted(own) + [-1] * groups)[:groups] for own in kept]).int()
    count = torch.tensor([len(own) for own in kept]).int()
    slots = ops.slots_of(index, count)
    most = max(1, *map(len, kept))
    if most == groups:
        assert slots is None
        return
    assert slots.dtype == torch.int64
    assert slots.tolist() == [(sorted(own) + [-1] * most)[:most] for own in kept]
    x = torch.randn(batch, groups, *more, dtype=torch.float64, requires_grad=True)
    held = ops.take_slots(x, slots)
    assert held.shape == (batch, most, *more)
    spread = ops.spread_slots(held, slots, groups)
    here = torch.tensor([[group in own for group in range(groups)] for own in kept])
    expected = x * here.view(batch, groups, *[1] * len(more))
    torch.testing.assert_close(spread, expected)
    cotangent = torch.randn_like(spread)
    grad, plain = (torch.autograd.grad(y, x, cotangent)[0] for y in (spread, expected))
    torch.testing.assert_close(grad, plain)


def test_what_does_not_fit_is_refused():
    heads, cos = torch.randn(2, 3, 4, 6), torch.randn(1, 4, 6)
    slots = torch.zeros(2, 2, dtype=torch.long)
    for call, text in (
        (lambda: ops.rotate_heads(heads, torch.randn(1, 4, 8), cos), "one even width of at most 6"),
        (lambda: ops.rotate_heads(heads, cos[..., :3], cos[..., :3]), "one even width"),
        (lambda: ops.rotate_heads(heads, cos[0], cos), r"\[B, H, L, d\].* got 4, 2 and 3"),
        (lambda: ops.causal_mask(heads, heads[:, :, :3], None, None), "q must not be longer than"),
        (lambda: ops.take_slots(heads, slots[:1]), r"slots must have shape \[2, K\], got \[1, 2\]"),
        (lambda: ops.spread_slots(heads, slots, 4), "slots must have 3 columns, as held, got 2"),
        (lambda: ops.spread_slots(heads[:, :2], slots, -1), "num_groups must be in 0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="slots must be int64, got Int"):
        ops.take_slots(heads, slots.int())


class Around(torch.nn.Module):
    """All of it: [B, H, L, d] -> [B, H, L, d]."""

    def forward(self, q, k, cos, sin, slots, mask):
        q, k = ops.rotate_heads(q, cos, sin), ops.rotate_heads(k, cos, sin, True)
        k = ops.take_slots(k, slots)
        q = ops.spread_slots(k, slots, q.size(1)) + q
        masks = align(q, q, None, mask, True, 2)
        hidden = hide(None, 2, q[:, 0])
        return ops.dense_attention(q, q, q, hidden, *masks[1:])


def example(batch=2, length=4, dtype=torch.float32):
    q, k = torch.randn(2, batch, 3, length, 6, dtype=dtype)
    slots = torch.tensor([0, 2]).expand(batch, -1).contiguous()
    return q, k, *angles(1, length, 4, dtype), slots, torch.rand(length, length) < 0.2


def test_compiles_whole_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(Around(), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 4), (3, 7), (5, 3)):
        inputs = example(batch, length)
        torch.testing.assert_close(compiled(*inputs), Around()(*inputs))


def test_exports_and_is_stored():
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=3)
    sizes = (
        {0: batch, 2: length},
        {0: batch, 2: length},
        {1: length},
        {1: length},
        {0: batch},
        {0: length, 1: length},
    )
    program = torch.export.export(Around(), example(), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for again in (torch.export.load(file), program.run_decompositions()):
        inputs = example(3, 5)
        torch.testing.assert_close(again.module()(*inputs), Around()(*inputs))


def test_runs_on_the_meta_device():
    inputs = example()
    got = Around()(*(tensor.to("meta") for tensor in inputs))
    assert got.is_meta and got.shape == inputs[0].shape


def test_gradients_and_functional_transforms():
    q, k, cos, sin, slots, mask = example(dtype=torch.float64)

    def run(q, k, cos, sin):
        return Around()(q, k, cos, sin, slots, mask)

    leaves = [tensor.requires_grad_() for tensor in (q, k, cos, sin)]
    torch.autograd.gradcheck(run, leaves)
    grad = torch.func.grad(lambda q: run(q, *leaves[1:]).square().sum())(q)
    (expected,) = torch.autograd.grad(run(*leaves).square().sum(), q)
    torch.testing.assert_close(grad, expected)
    many = torch.randn(3, *q.shape, dtype=q.dtype)
    got = torch.vmap(lambda q: run(q, k, cos, sin))(many)
    torch.testing.assert_close(got, torch.stack([run(q, k, cos, sin) for q in many]))


def test_under_autocast():
    q, _, cos, sin, *_ = example()
    half = q.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.rotate_heads(half, cos, sin)
    assert got.dtype == torch.float32, "products with angles in float32 are"
    torch.testing.assert_close(got, ops.rotate_heads(half.float(), cos, sin))
