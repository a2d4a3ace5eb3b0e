"""Structure plans: as a mask, compacted, and through files; both compute the same."""

import copy
import json
import pickle

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, EMBED, HEADS, _encoder, bert, bert_inputs
from support.structures import random_plan
from torch import nn
from torch.nn import functional as F

WITH_STREAM = [
    "TransformerEncoder",
    "TransformerEncoder, norm first, gelu",
    "BertModel",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForMaskedLM",
]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def build(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name], hw.convert(ARCHITECTURES[name].build())


def test_what_a_model_has():
    found = hw.pruning.structure(hw.convert(bert("BertModel")))
    first = "encoder.layer.0"
    assert list(found.heads.values()) == [HEADS, HEADS]
    assert next(iter(found.neurons)) == f"{first}.intermediate.dense"
    assert found.hidden_size == EMBED and len(found.layers) == 2
    tokens, width, head = 7, EMBED, EMBED // HEADS
    each = 4 * tokens * width * head + 2 * tokens**2 * head
    assert found.macs(tokens) == 2 * (HEADS * each + 32 * 2 * tokens * width)
    weights = 2 * (4 * EMBED * EMBED + 2 * 32 * EMBED)
    assert found.size == weights
    assert str(found) == (
        "2 attention layers (8 heads), 2 feed-forward networks (64 neurons), hidden dimensions: 24"
    )


@pytest.mark.parametrize(
    ("name", "neurons", "why"),
    [
        ("MultiheadAttention", 0, "'first' is not in a layer whose residual stream is known"),
        ("TransformerDecoder", 2, "'layers.0.multihead_attn' is not in a layer whose"),
        ("Transformer", 2, "'decoder.layers.0.multihead_attn' is not in a layer whose"),
    ],
)
def test_models_without_a_stream_say_why(name, neurons, why):
    _, model = build(name)
    found = hw.pruning.structure(model)
    assert len(found.ffn) == neurons and found.hidden_size is None
    assert found.no_stream.startswith(why)
    plan = hw.pruning.StructurePlan(hw.HeadPlan([]), hidden=hw.pruning.HiddenPlan(EMBED, [0]))
    with pytest.raises(ValueError, match="hidden dimensions of model cannot be pruned: '"):
        hw.prune(model, plan)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(3))
def test_compacted_equals_masked(name, seed):
    architecture, model = build(name)
    plan = random_plan(model, seed)
    before = sum(p.numel() for p in model.parameters())
    small = hw.prune(model, plan)
    inputs = architecture.inputs()
    expected_dense = architecture.run(model, inputs)
    masked = hw.mask(copy.deepcopy(model), plan)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(architecture.run(small, inputs), architecture.run(masked, inputs))
    assert not torch.allclose(architecture.run(masked, inputs), expected_dense, atol=1e-3)
    assert sum(p.numel() for p in small.parameters()) < before
    close(architecture.run(hw.unmask(masked), inputs), expected_dense)
    # Copies of a masked model have masks of their own; pruning takes them off.
    masked = hw.mask(copy.deepcopy(model), plan)
    close(architecture.run(copy.deepcopy(masked), inputs), architecture.run(masked, inputs), 0.0)
    close(architecture.run(hw.prune(masked, plan), inputs), architecture.run(small, inputs), 0.0)


@pytest.mark.parametrize("name", WITH_STREAM)
def test_every_part_by_itself(name):
    architecture, model = build(name)
    inputs = architecture.inputs()
    for part in ("heads", "neurons", "blocks", "hidden"):
        only = {kind: kind == part for kind in ("heads", "neurons", "blocks", "hidden")}
        plan = random_plan(model, 3, **only)
        masked = hw.mask(copy.deepcopy(model), plan)
        with torch.no_grad():
            close(architecture.run(hw.prune(model, plan), inputs), architecture.run(masked, inputs))


class PlainEncoder(nn.Module):
    """A post-norm encoder written out, on which masks are plain products: the reference."""

    def __init__(self, model, plan):
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, x):
        hidden = torch.zeros(EMBED)
        hidden[self.plan.hidden.dimensions] = torch.tensor(self.plan.hidden.scale)
        kept = hidden != 0

        def norm(layer, value):
            y = torch.zeros_like(value)
            y[..., kept] = F.layer_norm(
                value[..., kept], (int(kept.sum()),), layer.weight[kept], layer.bias[kept]
            )
            return y * hidden

        def block(layer, x, y, name):
            scale = self.plan.block_scale(name)
            # A removed block takes the norm on its sum with it.
            return norm(layer, x + y * scale * hidden) if scale != 0 else x

        def mask(entry, count, units):
            values = torch.zeros(count)
            values[getattr(entry, units)] = torch.tensor(entry.scale)
            return values

        x = x * hidden
        for layer, heads, ffn in zip(
            self.model.layers, self.plan.heads.layers, self.plan.ffn, strict=True
        ):
            mha, size = layer.self_attn, EMBED // HEADS
            q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)
            y = torch.zeros_like(x)
            for h, value in enumerate(mask(heads, HEADS, "heads")):
                part = slice(h * size, (h + 1) * size)
                scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
                context = scores.softmax(-1) @ v[..., part]
                y = y + value * context @ mha.out_proj.weight[:, part].T
            x = block(layer.norm1, x, y + mha.out_proj.bias, heads.name)
            act = F.relu(layer.linear1(x)) * mask(ffn, 32, "neurons")
            x = block(layer.norm2, x, layer.linear2(act), ffn.name)
        return x


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_the_plain_products(seed):
    torch.manual_seed(seed)
    model = hw.convert(_encoder())
    plan = random_plan(model, seed)
    x = torch.randn(2, 5, EMBED)
    expected = PlainEncoder(model, plan)(x)
    close(hw.mask(copy.deepcopy(model), plan)(x), expected)
    close(hw.prune(model, plan)(x), expected)


def test_a_bias_outlives_its_neurons_but_not_its_block():
    model = hw.convert(bert("BertModel"))
    ffn, other = hw.pruning.structure(model).ffn.values()
    plan = hw.pruning.StructurePlan(
        hw.HeadPlan([]),
        [hw.pruning.FfnPlan(ffn.name, 32, [])],
        [hw.pruning.BlockPlan(other.name, 0.0)],
    )
    small = hw.pruning.structure(hw.prune(model, plan)).ffn
    assert torch.equal(small[ffn.name].second.bias, ffn.second.bias)
    assert small[ffn.name].second.weight.shape == (EMBED, 0)
    assert small[other.name].second.bias is None and small[other.name].first.bias.numel() == 0


@pytest.mark.parametrize("name", [*WITH_STREAM, "TransformerDecoder", "MultiheadAttention"])
def test_save_and_load(name, tmp_path):
    architecture, model = build(name)
    small = hw.prune(model, random_plan(model, 1))
    hw.save(small, tmp_path / "small")
    fresh = None if name.startswith("Bert") else architecture.build()
    loaded = hw.load(tmp_path / "small", fresh)
    inputs = architecture.inputs()
    with torch.no_grad():
        close(architecture.run(loaded, inputs), architecture.run(small, inputs), 0.0)
    hw.save(loaded, tmp_path / "again")
    for file in ("headwise.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()


def test_pruning_again_and_training_go_on(tmp_path):
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3))
    small = hw.prune(model, random_plan(model, 1))
    smaller = hw.prune(small, random_plan(small, 2, blocks=False))
    hw.save(smaller, tmp_path / "m")
    inputs = bert_inputs()
    close(hw.load(tmp_path / "m")(**inputs).logits, smaller(**inputs).logits, 0.0)
    assert (
        hw.pruning.structure(smaller).hidden_size < hw.pruning.structure(small).hidden_size < EMBED
    )
    optimiser = torch.optim.SGD(smaller.parameters(), 0.1)
    smaller.train()(**inputs).logits.square().sum().backward()
    optimiser.step()
    wide = hw.convert(bert("BertModel"))
    narrow = hw.prune(wide, random_plan(wide, 1))
    assert hw.pruning.structure(narrow).no_stream == "they were pruned before"


def test_a_masked_model_is_not_saved(tmp_path):
    model = hw.convert(bert("BertModel"))
    hw.mask(model, random_plan(model, neurons=True, heads=False, hidden=False))
    with pytest.raises(ValueError, match="model has a structure plan as a mask, which cannot be"):
        hw.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_files_that_are_wrong_are_refused(tmp_path):
    model = hw.convert(bert("BertModel"))
    hw.save(hw.prune(model, random_plan(model, 1)), tmp_path / "m")
    path = tmp_path / "m" / "headwise.json"
    good, none = json.loads(path.read_text()), {"skipped_norms": []}
    for change, text in (
        ({"ffn": []}, "must be an object with the keys ffn, hidden, skipped_norms"),
        (
            {"ffn": [{"name": "x"}], "hidden": None, **none},
            "must be a list of objects with name, neurons",
        ),
        (
            {"ffn": [], "hidden": {"size": 4, "kept": 0}, **none},
            "must be null or an object with size and",
        ),
        (
            {"ffn": [{"name": "x", "neurons": 1, "bias": True}], "hidden": None, **none},
            "no feed-forward",
        ),
    ):
        path.write_text(json.dumps({**good, "structure": change}))
        with pytest.raises(ValueError, match=text):
            hw.load(tmp_path / "m")


def test_plans_are_files(tmp_path):
    model = hw.convert(bert("BertModel"))
    plan = random_plan(model, 5)
    plan.save(tmp_path / "plan.json")
    assert hw.pruning.StructurePlan.load(tmp_path / "plan.json") == plan
    assert pickle.loads(pickle.dumps(plan)) == plan and copy.deepcopy(plan) == plan
    # A plan of heads alone is a structure plan.
    heads = hw.HeadPlan([hw.pruning.LayerPlan("a", 4, [0, 2])], "michel")
    heads.save(tmp_path / "heads.json")
    assert hw.pruning.StructurePlan.load(tmp_path / "heads.json") == hw.pruning.StructurePlan(heads)
    document = json.loads(plan.to_json())
    assert document["heads"]["format"] == "headwise.plan"
    document["neurons"] = 3
    with pytest.raises(ValueError, match='structure plan has an unknown key "neurons"'):
        hw.pruning.StructurePlan.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: hw.pruning.StructurePlan(hw.HeadPlan([]), [hw.pruning.FfnPlan("f", 4, [1, 1])]),
            'neurons in plan of feed-forward network "f" must be ascending and different, got 1',
        ),
        (
            lambda: hw.pruning.StructurePlan(hw.HeadPlan([]), [hw.pruning.FfnPlan("f", 4, [4])]),
            'neurons in plan of feed-forward network "f" must be between 0 and 3, got 4',
        ),
        (
            lambda: hw.pruning.StructurePlan(hw.HeadPlan([]), hidden=hw.pruning.HiddenPlan(4, [])),
            "dimensions in plan of the hidden dimensions must not be empty: at least one must stay",
        ),
        (
            lambda: hw.pruning.StructurePlan(
                hw.HeadPlan([]), [hw.pruning.FfnPlan("f", 4, [1])], [hw.pruning.BlockPlan("f", 0.0)]
            ),
            'block "f" has scale 0, so it must have no neurons left, got 1',
        ),
        (
            lambda: hw.pruning.StructurePlan(
                hw.HeadPlan([]), blocks=[hw.pruning.BlockPlan("f", float("nan"))]
            ),
            'scale of block "f" must be finite, got nan',
        ),
        (
            lambda: hw.pruning.StructurePlan(
                hw.HeadPlan([]), hidden=hw.pruning.HiddenPlan(4, [0], [float("inf")])
            ),
            "scale in plan of the hidden dimensions must be finite, got inf",
        ),
    ],
)
def test_plans_that_make_no_sense(make, text):
    with pytest.raises(ValueError) as error:
        make()
    assert text in str(error.value)


def test_refusals_leave_the_model_alone():
    model = hw.convert(bert("BertModel"))
    name = next(iter(hw.pruning.structure(model).ffn))
    for plan, text in (
        (
            [hw.pruning.FfnPlan("x", 4, [1])],
            "plan names network 'x', which model does not have; it has 'encoder",
        ),
        (
            [hw.pruning.FfnPlan(name, 4, [1])],
            "plan has 4 neurons for network '.*', which has 32 in model",
        ),
    ):
        for apply in (hw.mask, hw.prune):
            with pytest.raises(ValueError, match=text):
                apply(model, hw.pruning.StructurePlan(hw.HeadPlan([]), plan))
    with pytest.raises(ValueError, match="plan names block 'x', which model does not have"):
        hw.prune(
            model, hw.pruning.StructurePlan(hw.HeadPlan([]), blocks=[hw.pruning.BlockPlan("x")])
        )
    with pytest.raises(ValueError, match="plan has 9 hidden dimensions, model has 24"):
        hw.prune(
            model, hw.pruning.StructurePlan(hw.HeadPlan([]), hidden=hw.pruning.HiddenPlan(9, [0]))
        )
    gated = hw.convert(bert("BertModel"), hw.RandomGate())
    with pytest.raises(ValueError, match="has a RandomGate: remove it first"):
        hw.prune(gated, random_plan(gated))
    assert hw.pruning.structure(model).neurons == {n: 32 for n in hw.pruning.structure(model).ffn}


def test_masked_layer_norm_is_layer_norm_of_what_is_left():
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    op = torch.ops.headwise.masked_layer_norm
    y = op(x, mask, weight, bias, 1e-5, True)
    kept = mask != 0
    expected = F.layer_norm(x[:, kept], (4,), weight[kept], bias[kept], 1e-5) * mask[kept]
    close(y[:, kept], expected, 1e-12)
    assert (y[:, ~kept] == 0).all()
    one = torch.ones(6, dtype=torch.float64)
    close(op(x, one, weight, bias, 1e-5, False), F.layer_norm(x, (6,), weight, bias), 1e-12)
    assert torch.autograd.gradcheck(lambda x: op(x, mask.detach(), weight, bias), (x,))
    soft = torch.rand(6, dtype=torch.float64, requires_grad=True)  # none is 0
    assert torch.autograd.gradcheck(lambda m: op(x.detach(), m, weight, bias), (soft,))
    with pytest.raises(ValueError, match=r"mask must have shape \[6\], got \[5\]"):
        op(x, mask[:5])
