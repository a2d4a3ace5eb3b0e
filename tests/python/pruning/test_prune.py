"""headwise.prune removes heads for good and computes what headwise.mask computes."""

import copy
import json

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs
from support.structures import make_plan
from torch import nn


@pytest.fixture(params=ARCHITECTURES.values(), ids=lambda row: row.name)
def architecture(request):
    torch.manual_seed(0)
    return request.param


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kept", [[[0, 2], [3]], [[1, 2, 3], []], [[], []]], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_pruned_equals_masked(architecture, kept, grad):
    model = hw.convert(architecture.build())
    plan = make_plan(model, kept)
    small = hw.prune(model, plan)
    masked = hw.mask(copy.deepcopy(model), plan)
    inputs = architecture.inputs()
    with torch.set_grad_enabled(grad):
        close(architecture.run(small, inputs), architecture.run(masked, inputs))
    for entry in plan.layers:
        layer = hw.attention_layers(small)[entry.name]
        width = len(entry.heads) * layer.head_dim
        assert layer.num_heads == len(entry.heads)
        assert layer.head_dim == EMBED // HEADS
        assert layer.output_projection.weight.shape == (EMBED, width)
        if getattr(layer, "in_proj_weight", None) is not None:
            assert layer.in_proj_weight.shape == (3 * width, EMBED)
    assert all(layer.num_heads == HEADS for layer in hw.attention_layers(model).values())


def test_gradients_of_pruned_equal_masked(architecture):
    model = hw.convert(architecture.build())
    plan = make_plan(model, [[0, 2], [3]], scaled=False)
    small, masked = hw.prune(model, plan), hw.mask(model, plan)
    inputs = architecture.inputs()
    for m in (small, masked):
        architecture.run(m, inputs).square().sum().backward()
    for entry in plan.layers:
        a = hw.attention_layers(small)[entry.name]
        b = hw.attention_layers(masked)[entry.name]
        columns = [h * b.head_dim + i for h in entry.heads for i in range(b.head_dim)]
        own, other = (layer.output_projection.weight.grad for layer in (a, b))
        close(own, other[:, columns], 1e-4)


def test_pruned_models_train(architecture):
    model = hw.convert(architecture.build())
    small = hw.prune(model, make_plan(model, [[], [0, 2]]))
    loss = architecture.run(small, architecture.inputs()).square().sum()
    loss.backward()
    for layer in hw.attention_layers(small).values():
        if layer.num_heads:
            assert layer.output_projection.weight.grad.abs().sum() > 0


def test_keeps_dtype_mode_frozen_parameters_and_unnamed_layers():
    model = hw.convert(bert("BertModel").double().train())
    first, second = hw.attention_layers(model).values()
    first.in_proj_weight.requires_grad_(False)
    plan = make_plan(model, [[1]])
    document = json.loads(plan.to_json())
    del document["layers"][1]
    small = hw.prune(model, hw.HeadPlan.from_json(json.dumps(document)), inplace=True)
    assert small is model
    pruned, left = hw.attention_layers(model).values()
    assert left is second
    assert pruned.training and pruned.in_proj_weight.dtype == torch.float64
    assert not pruned.in_proj_weight.requires_grad and pruned.out_proj.weight.requires_grad


def test_half_precision_scales_are_folded_once():
    model = hw.convert(bert("BertModel").to(torch.bfloat16))
    small = hw.prune(model, make_plan(model, [[1]]))
    for old, new in zip(
        hw.attention_layers(model).values(), hw.attention_layers(small).values(), strict=True
    ):
        width = old.head_dim
        expected = (old.out_proj.weight[:, width : 2 * width].float() * 1.25).bfloat16()
        assert torch.equal(new.out_proj.weight, expected)


def test_a_layer_by_itself_and_tied_layers():
    layer = hw.convert(nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval())
    small = hw.prune(layer, make_plan(layer, [[2]]))
    assert isinstance(small, hw.MultiheadAttention) and small.num_heads == 1
    assert layer.num_heads == HEADS
    tied = nn.ModuleList([layer, nn.Sequential(layer)])
    small = hw.prune(tied, make_plan(tied, [[2]]))
    assert small[0] is small[1][0] and small[0].num_heads == 1


def test_the_plan_replaces_fixed_gates():
    model = hw.convert(bert("BertModel"))
    plan = make_plan(model, [[0, 3]])
    inputs = bert_inputs()
    expected = hw.prune(model, plan)(**inputs).last_hidden_state
    masked = hw.mask(model, plan)
    close(hw.prune(masked, plan)(**inputs).last_hidden_state, expected, 0.0)


def test_pruning_twice():
    model = hw.convert(bert("BertModel"))
    once = hw.prune(model, make_plan(model, [[0, 1, 3]], scaled=False))
    twice = hw.prune(once, make_plan(once, [[0, 2]], scaled=False))
    at_once = hw.prune(model, make_plan(model, [[0, 3]], scaled=False))
    inputs = bert_inputs()
    close(twice(**inputs).last_hidden_state, at_once(**inputs).last_hidden_state, 0.0)


def test_gates_choose_among_the_heads_that_are_left():
    model = hw.convert(bert("BertModel"))
    small = hw.convert(hw.prune(model, make_plan(model, [[0, 1, 3]])), hw.RandomGate(keep=0.34))
    with torch.no_grad(), hw.trace(small) as t:
        small(**bert_inputs())
    assert t.summary().mean_heads == 2.0


def test_attention_maps_of_pruned_bert_have_the_heads_that_are_left():
    model = hw.convert(bert("BertModel"))
    small = hw.prune(model, make_plan(model, [[0, 2], []]))
    attentions = small(**bert_inputs(), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(3, 2, 7, 7), (3, 0, 7, 7)]


def test_refusals_leave_the_model_alone():
    model = hw.convert(bert("BertModel"), hw.RandomGate())
    plan = make_plan(model, [[0]])
    before = dict(hw.attention_layers(model))
    with pytest.raises(ValueError, match="has a RandomGate, which chooses among the heads"):
        hw.prune(model, plan, inplace=True)
    other = hw.convert(ARCHITECTURES["TransformerEncoder"].build())
    with pytest.raises(
        ValueError, match="plan names layer 'encoder.layer.0.*', which model does not have"
    ):
        hw.prune(other, plan)
    wide = hw.convert(bert("BertModel", num_attention_heads=6))
    with pytest.raises(ValueError, match="plan has 4 heads for layer '.*', which has 6 in model"):
        hw.mask(wide, plan)
    with pytest.raises(ValueError, match="has no headwise.MultiheadAttention: call headwise.conv"):
        hw.prune(nn.Linear(2, 2), plan)
    for change in (hw.prune, hw.mask):
        with pytest.raises(TypeError, match=r"plan must be a headwise.HeadPlan .* got 'plan.json'"):
            change(model, "plan.json")
    assert hw.attention_layers(model) == before
    assert all(isinstance(layer.gate, hw.RandomGate) for layer in before.values())


def gated_encoder():
    """Two layers of four heads whose hard-concrete gates choose for every input."""
    torch.manual_seed(3)
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2,
        enable_nested_tensor=False,
    )  # fmt: skip
    gate = hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0)
    model = hw.convert(stack, gate).eval()
    for layer in hw.attention_layers(model).values():
        nn.init.normal_(layer.gate.relevance.weight, std=2.0)
    batches = [torch.randn(size, 5, 16) for size in (7, 4)]
    return model, batches


def run(model, batch):
    return model(batch)


@pytest.mark.parametrize("keep", [None, 0.25, 1.0])
def test_a_plan_of_what_gates_were_seen_to_choose(keep):
    model, batches = gated_encoder()
    ran, weight = {}, {}
    for batch in batches:
        with hw.trace(model) as trace, torch.no_grad():
            model(batch)
        for name, found in trace.selections.items():
            rows = [
                [h in index[:count] for h in range(4)]
                for index, count in zip(found.index.tolist(), found.count.tolist(), strict=True)
            ]
            ran.setdefault(name, []).extend(rows)
            weight.setdefault(name, []).extend(found.weight.tolist())
    share = {name: torch.tensor(rows).double().mean(0) for name, rows in ran.items()}
    assert 0 < torch.cat(list(share.values())).mean() < 1  # they differ from input to input
    plan = hw.pruning.plan_from_use(model, batches, run, keep)
    wanted = hw.plan(
        hw.HeadScores("use", share),
        torch.cat(list(share.values())).mean().item() if keep is None else keep,
    )
    assert [entry.heads for entry in plan.layers] == [entry.heads for entry in wanted.layers]
    for entry in plan.layers:
        for head, scale in zip(entry.heads, entry.scale, strict=True):
            seen = [w[head] for w, r in zip(weight[entry.name], ran[entry.name], strict=True)
                    if r[head]]  # fmt: skip
            assert scale == pytest.approx(sum(seen) / max(1, len(seen)), abs=1e-6)
    small = hw.prune(model, plan)
    assert all(layer.gate is None for layer in hw.attention_layers(small).values())
    close(small(batches[0]), hw.mask(copy.deepcopy(model), plan)(batches[0]))
    assert hw.HeadPlan.from_json(plan.to_json()) == plan


def test_plans_of_use_are_refused_where_there_is_none():
    model, batches = gated_encoder()
    plan = hw.pruning.plan_from_use(model, batches, run)
    other = hw.HeadPlan(plan.layers, "mine")
    with pytest.raises(ValueError, match="or prune by a plan of its choices"):
        hw.prune(model, other)
    with pytest.raises(ValueError, match="batches must run every gated layer, got no run of"):
        hw.pruning.plan_from_use(model, [], run)
    with pytest.raises(ValueError, match="keep must be"):
        hw.pruning.plan_from_use(model, batches, run, 1.5)
    with pytest.raises(ValueError, match="must have gates to make a plan from, got none"):
        hw.pruning.plan_from_use(hw.prune(model, plan), batches, run)
