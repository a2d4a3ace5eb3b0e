"""headwise.convert.qkv: attention of one's own class, described and proved."""

import copy
import pickle

import headwise as hw
import pytest
import torch
from headwise.convert import qkv
from support.structures import make_plan
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 24, 4


class Separate(nn.Module):
    """Four projections, grouped keys, a mask that is added, dropouts, and a pair returned."""

    def __init__(self, groups=2, causal=False):
        super().__init__()
        self.heads, self.groups, self.causal = HEADS, groups, causal
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // HEADS * groups, False)
        self.v = nn.Linear(WIDTH, WIDTH // HEADS * groups)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Dropout(0.2), nn.Dropout(0.1)

    def forward(self, x, bias=None, flag=False, other=None):
        q, k, v = (p(x).unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2)
                   for p in (self.q, self.k, self.v))  # fmt: skip
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, v))
        p = self.inner.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, p, self.causal)
        return self.outer(self.o(y.transpose(1, 2).flatten(2))), None


class Packed(nn.Module):
    """The layout of timm's attention, or (per head) of GPT-NeoX; a boolean mask."""

    def __init__(self, per_head=False):
        super().__init__()
        self.num_heads, self.per_head = HEADS, per_head
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.proj_drop = nn.Identity(), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        order = (HEADS, 3) if self.per_head else (3, HEADS)
        parts = self.qkv(x).unflatten(2, (*order, -1))
        q, k, v = parts.unbind(3 if self.per_head else 2)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def separate(**options):
    known = {
        "query": "q",
        "key": "k",
        "value": "v",
        "output": "o",
        "num_heads": "heads",
        "num_key_value_heads": "groups",
        "dropout": "inner",
        "output_dropout": "outer",
        "mask": "bias",
        "pair": True,
    }
    return qkv(**{**known, **options})


def packed(**options):
    options = {"num_heads": "num_heads", "mask": "attn_mask", "additive": False, **options}
    return qkv(packed="qkv", output="proj", **options)


CASES = {
    "separate": (Separate, separate()),
    "causal": (lambda: Separate(causal=True), separate(causal=True, mask=None)),
    "packed": (Packed, packed()),
    "packed by heads": (lambda: Packed(per_head=True), packed(per_head=True)),
}


class Model(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, x, *mask):
        for layer in self.layers:
            y = layer(x, *mask)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, adapter = CASES[request.param]
    model = Model(make).eval()
    return model, {type(model.layers[0]): adapter}, torch.randn(3, 5, WIDTH)


def masks(adapter):
    if adapter._call["mask"] is None:
        return []
    seen = (torch.rand(3, 1, 5, 5) > 0.4) | torch.eye(5, dtype=torch.bool)
    return [torch.zeros(seen.shape).masked_fill(~seen, -1e4) if adapter._call["additive"] else seen]


def test_equals_the_original_and_every_head_counts(case):
    original, adapters, x = case
    mask = masks(next(iter(adapters.values())))
    for gate in (None, hw.FixedGate()):
        model = hw.convert(copy.deepcopy(original), gate, adapters=adapters)
        close(model(x), original(x))
        close(model(x, *mask), original(x, *mask))
        ys = [m(x.clone().requires_grad_(), *mask) for m in (model, original)]
        inputs = [torch.autograd.grad(y.square().sum(), m.layers[0].parameters())[-2:]
                  for y, m in zip(ys, (model, original), strict=True)]  # fmt: skip
        for own, wanted in zip(*inputs, strict=True):
            close(own, wanted, 1e-4)
    full = model(x, *mask)
    for layer in hw.attention_layers(model).values():
        for head in range(HEADS):
            layer.gate.scale[head] = 0.0
            assert (model(x, *mask) - full).abs().max() > 1e-4
            layer.gate.scale[head] = 1.0


def test_prunes_saves_copies_and_traces(case, tmp_path):
    original, adapters, x = case
    model = hw.convert(copy.deepcopy(original), adapters=adapters)
    plan = make_plan(model, [[0, 2], [3]])
    small, masked = hw.prune(model, plan), hw.mask(copy.deepcopy(model), plan)
    with torch.no_grad():
        close(small(x), masked(x))
        hw.save(small, tmp_path / "m")
        fresh = hw.convert(copy.deepcopy(original), adapters=adapters)
        close(hw.load(tmp_path / "m", model=fresh)(x), small(x), 0.0)
        close(pickle.loads(pickle.dumps(small))(x), small(x), 0.0)
        hw.convert(model, hw.BudgetGate(keep=0.5))
        with hw.trace(model) as trace:
            model(x)
    assert list(trace.layers) == ["layers.0", "layers.1"]


def test_a_wrong_description_is_refused():
    torch.manual_seed(0)
    model = Model(Separate).eval()
    for options, text in (
        ({"num_heads": 2}, "not as wide as whole heads"),
        ({"num_heads": "layers"}, "the adapter does not fit .*no attribute 'layers'"),
        ({"scale": 0.3}, "would not compute what it did"),
        ({"causal": True, "mask": None}, "would not compute what it did"),
        ({"pair": False}, "its forward returns a tuple: use pair=True"),
        ({"mask": "masked"}, "its forward takes no 'masked'"),
        ({"dropout": 0.0}, "it holds the Dropout 'inner', which the adapter does not mention"),
        ({"output": "p"}, "the adapter does not fit"),
    ):
        with pytest.raises(ValueError, match=text):
            hw.convert(model, adapters={Separate: separate(**options)})
        assert not hw.attention_layers(model)
    blocks = Model(Packed).eval()
    with pytest.raises(ValueError, match="would not compute what it did"):
        hw.convert(blocks, adapters={Packed: packed(per_head=True)})
    wrapped = copy.deepcopy(blocks)
    wrapped.layers[0].proj = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="its proj was replaced by a torch"):
        hw.convert(wrapped, adapters={Packed: packed()})
    blocks.layers[1].norm = nn.LayerNorm(WIDTH)
    with pytest.raises(ValueError, match="it holds 'norm', which its class does not have"):
        hw.convert(blocks, adapters={Packed: packed()})


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="packed must name one projection, or query, key and value"
    ):
        qkv(query="q", output="o", num_heads=2)
    with pytest.raises(
        ValueError, match="packed must name one projection, or query, key and value"
    ):
        qkv(packed="x", query="q", key="k", value="v", output="o", num_heads=2)
    with pytest.raises(ValueError, match="per_head is for a packed projection"):
        qkv(packed="x", per_head=True, num_key_value_heads=1, output="o", num_heads=2)
    for adapters, text in (
        ([Packed], "adapters must be a mapping or None, got list"),
        ({"Packed": packed()}, "adapters must have classes of modules as keys"),
        ({Packed: Packed}, "must be made by headwise.convert.qkv, got type"),
    ):
        with pytest.raises(TypeError, match=text):
            hw.convert(Model(Packed), adapters=adapters)


def test_what_it_was_not_told_of_is_refused():
    model = hw.convert(Model(Separate).eval(), adapters={Separate: separate()})
    x, layer = torch.randn(2, 5, WIDTH), model.layers[0]
    close(layer(x, None, False, other=None)[0], layer(x)[0], 0.0)
    with pytest.raises(TypeError, match="does not understand the argument 'other'"):
        layer(x, other=torch.ones(1))
    with pytest.raises(TypeError, match="does not understand the argument 'flag'"):
        layer(x, None, True)
    with pytest.raises(TypeError, match="bias must be floating, got torch.bool"):
        layer(x, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="takes 4 arguments, got 5"):
        layer(x, None, False, None, None)
