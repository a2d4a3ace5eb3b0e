"""Repair: least squares against plain formulas, and heads that others can replace."""

import copy

import headwise as hw
import pytest
import torch
from headwise import _C
from headwise.nn.batches import call_model
from headwise.pruning.replay import Replay
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs, bert_mask
from torch import nn


def plain_ridge(x, y, weight, ridge, bias=True):
    """The minimiser of mean |y - W x - b|^2 + ridge s |W - weight|^2, by the normal equations."""
    x, y, start = x.double(), y.double(), weight.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros(x.size(1)).double(), 0.0)
    centred, rest = x - mean_x, y - mean_y - (x - mean_x) @ start.T
    gram = centred.T @ centred / len(x)
    size = gram.diagonal().mean()
    change = torch.linalg.solve(
        gram + ridge * size * torch.eye(x.size(1)).double(), centred.T @ rest / len(x)
    )
    found = start + change.T
    return found, (mean_y - found @ mean_x) if bias else None


def moments_of(x, y, parts=1):
    moments = _C.OutputMoments(x.size(1), y.size(1))
    for own, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(own, other)
    return moments


def linear_data(tokens=60, inputs=6, outputs=5, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix + 2.0
    true = torch.randn(outputs, inputs, generator=generator)
    y = x @ true.T + noise * torch.randn(tokens, outputs, generator=generator) - 1.0
    return x, y, torch.randn(outputs, inputs, generator=generator)


# --- moments ---


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 7),
    outputs=st.integers(1, 5),
    ridge=st.sampled_from([1e-6, 1e-3, 0.1, 3.0]),
    bias=st.booleans(),
    parts=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_solution_is_that_of_the_normal_equations(
    tokens, inputs, outputs, ridge, bias, parts, seed
):
    x, y, start = (t.double() for t in linear_data(tokens, inputs, outputs, seed=seed))
    moments = moments_of(x, y, min(parts, tokens))
    if tokens == 1 and bias:  # nothing varies: the weights stay, the bias takes the mean
        expected, offset = start, (y - x @ start.T)[0]
    else:
        expected, offset = plain_ridge(x, y, start, ridge, bias)
    found, found_bias = moments.solve(start, torch.zeros(outputs).double() if bias else None, ridge)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(found_bias, offset, rtol=1e-5, atol=1e-5)
    else:
        assert found_bias is None
    assert moments.tokens == tokens


def test_solution_has_the_dtype_of_the_weights_and_moments_are_float64():
    x, y, start = linear_data()
    expected, offset = plain_ridge(x, y, start, 0.01)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight, bias = moments_of(x, y).solve(start.to(dtype), torch.zeros(5, dtype=dtype), 0.01)
        assert weight.dtype == bias.dtype == dtype
        if dtype != torch.bfloat16:
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bias.double(), offset, rtol=1e-5, atol=1e-5)


def test_moments_merge_and_select():
    x, y, start = linear_data()
    whole, first, second = moments_of(x, y), moments_of(x[:20], y[:20]), moments_of(x[20:], y[20:])
    before = first.error(start)
    first.merge(second)
    assert first.tokens == 60 and first.error(start) != before
    assert first.error(start) == pytest.approx(whole.error(start))
    columns = [0, 2, 5]
    found = whole.select(columns).solve(start[:, columns], torch.zeros(5), 0.1)
    expected = moments_of(x[:, columns], y).solve(start[:, columns], torch.zeros(5), 0.1)
    torch.testing.assert_close(found, expected)
    part = whole.select(columns)
    part.add(x[:, columns], y)  # the whole does not change with it
    assert whole.tokens == 60 and part.tokens == 120
    assert whole.error(start) == pytest.approx(moments_of(x, y).error(start))


def test_error_and_variance_are_means_over_tokens():
    x, y, start = linear_data()
    moments, bias = moments_of(x, y), torch.randn(5)
    for offset in (bias, None):
        own = y - x @ start.T - (0 if offset is None else offset)
        assert moments.error(start, offset) == pytest.approx(
            own.double().square().sum(1).mean().item(), rel=1e-4
        )
    spread = (y - y.mean(0)).double().square().sum(1).mean().item()
    assert moments.variance() == pytest.approx(spread, rel=1e-5)


def test_the_ridge_with_the_least_held_out_error_wins():
    x, y, start = linear_data(tokens=400, noise=3.0)
    x, y, held_x, held_y = x[:12], y[:12], x[200:], y[200:]
    fit, held_out = moments_of(x, y), moments_of(held_x, held_y)
    ridges = [1e-4, 1e-2, 1.0, 100.0]
    errors = [held_out.error(*fit.solve(start, torch.zeros(5), ridge)) for ridge in ridges]
    found = _C.repair_projection(fit, held_out, start, torch.zeros(5), ridges)
    assert found.ridge == ridges[errors.index(min(errors))]
    assert found.error_after == pytest.approx(min(errors))
    assert found.error_before == pytest.approx(held_out.error(start, torch.zeros(5)))
    fit.merge(held_out)  # what is held out counts in the end
    torch.testing.assert_close(found.weight, fit.solve(start, torch.zeros(5), found.ridge)[0])


def test_weights_that_no_ridge_betters_stay():
    x, y, start = linear_data(noise=0.0)
    best, bias = plain_ridge(x, y, start, 0.0)
    best, bias = best.float(), bias.float()
    other_x, other_y, _ = linear_data(seed=5)
    found = _C.repair_projection(
        moments_of(other_x, other_y), moments_of(x, y), best, bias, [1e-3, 1.0]
    )
    assert found.ridge is None and found.error_after == found.error_before
    assert torch.equal(found.weight, best) and torch.equal(found.bias, bias)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_removal_order_is_the_greedy_one(group):
    x, y, start = (t.double() for t in linear_data(tokens=200, inputs=6))
    moments = moments_of(x, y)
    order = _C.removal_order(moments, start, group, 1e-9)
    left = list(range(6 // group))

    def error_of(units):
        columns = [unit * group + i for unit in units for i in range(group)]
        own = moments.select(columns)
        return own.error(*own.solve(start[:, columns], torch.zeros(5).double(), 1e-9))

    for unit, error in zip(order.units, order.error, strict=True):
        errors = {u: error_of([v for v in left if v != u]) for u in left}
        assert unit == min(errors, key=errors.get)
        assert error == pytest.approx(errors[unit], rel=1e-5, abs=1e-8)
        left.remove(unit)
    assert left == [] and order.error[-1] == pytest.approx(moments.variance())


def test_moments_say_what_does_not_fit():
    moments = _C.OutputMoments(3, 2)
    with pytest.raises(ValueError, match=r"inputs must have shape \[T, 3\], got \[4, 2\]"):
        moments.add(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"targets must have shape \[4, 2\], got \[5, 2\]"):
        moments.add(torch.ones(4, 3), torch.ones(5, 2))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="inputs must be finite, got NaN or infinity"):
            moments.add(torch.full((4, 3), bad), torch.ones(4, 2))
        with pytest.raises(ValueError, match="targets must be finite, got NaN or infinity"):
            moments.add(torch.ones(4, 3), torch.full((4, 2), bad))
    assert moments.tokens == 0
    with pytest.raises(ValueError, match="moments must be of at least one token, got none"):
        moments.solve(torch.zeros(2, 3), None, 0.1)
    moments.add(torch.randn(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"ridge must be finite and not negative, got -1"):
        moments.solve(torch.zeros(2, 3), None, -1.0)
    with pytest.raises(ValueError, match=r"weight must have shape \[2, 3\], got \[3, 2\]"):
        moments.solve(torch.zeros(3, 2), None, 0.1)
    with pytest.raises(RuntimeError, match="moments of 2 tokens are singular at ridge=0"):
        moments.solve(torch.zeros(2, 3), None, 0.0)
    with pytest.raises(ValueError, match="group must be positive and divide the 3 inputs, got 2"):
        _C.removal_order(moments, torch.zeros(2, 3), 2, 0.1)
    with pytest.raises(ValueError, match="ridges must not be empty"):
        _C.repair_projection(moments, moments, torch.zeros(2, 3), None, [])
    with pytest.raises(ValueError, match="moments must be of 3 inputs and 2 outputs, got 4 and 2"):
        moments.merge(_C.OutputMoments(4, 2))


# --- models ---


def twin_heads(model):
    """Makes the second head of every attention layer compute what the first does, and returns the
    plan that keeps the first alone of the two."""
    entries = []
    with torch.no_grad():
        for name, layer in hw.attention_layers(model).items():
            d = layer.head_dim
            if isinstance(layer, hw.GroupedQueryAttention):
                own = [layer.q_proj]
                if layer.num_key_value_heads == layer.num_heads:
                    own += [layer.k_proj, layer.v_proj]
                for parameter in (p for projection in own for p in projection.parameters()):
                    parameter[d : 2 * d] = parameter[:d]
            else:
                rows = [
                    p
                    for n, p in layer.named_parameters()
                    if n.endswith("proj_weight") or n == "in_proj_bias"
                ]
                for parameter in rows:
                    for start in range(0, len(parameter), HEADS * d):
                        parameter[start + d : start + 2 * d] = parameter[start : start + d]
                for bias in (layer.bias_k, layer.bias_v):
                    if bias is not None:
                        bias[..., d : 2 * d] = bias[..., :d]
            entries.append(hw.pruning.LayerPlan(name, layer.num_heads, [0, 2, 3]))
    return hw.HeadPlan(entries, "twins")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_repair_makes_up_for_heads_that_others_can_stand_in_for(name):
    torch.manual_seed(3)
    row = ARCHITECTURES[name]
    dense = hw.convert(row.build())
    plan = twin_heads(dense)
    batches = [row.inputs() for _ in range(12)]
    small = hw.prune(dense, plan)
    with torch.no_grad():
        expected, pruned = row.run(dense, batches[3]), row.run(small, batches[3])
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    done = hw.repair(small, batches, dense, forward_fn=row.run, ridges=(1e-9,))
    with torch.no_grad():
        left = (row.run(small, batches[3]) - expected).norm() / (pruned - expected).norm()
    # A layer that runs several times is fitted to all its calls at once, before any is repaired.
    shared = name == "AlbertModel" or name.startswith("AlbertFor")
    assert left < (0.7 if shared else 0.02)
    assert done and all(layer.error_after < (0.5 if shared else 1e-4) for layer in done)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def tiny_bert(seed=0, **kwargs):
    torch.manual_seed(seed)
    return hw.convert(bert("BertForSequenceClassification", num_labels=3, **kwargs))


def batches_of(count=8, seed=1):
    torch.manual_seed(seed)
    return [bert_inputs() for _ in range(count)]


def half_plan(model, heads=(1, 2)):
    return hw.HeadPlan(
        [
            hw.pruning.LayerPlan(name, layer.num_heads, list(heads))
            for name, layer in hw.attention_layers(model).items()
        ],
        "half",
    )


def test_prune_repairs_with_the_batches_it_is_given():
    dense, batches = tiny_bert(), batches_of()
    plan = half_plan(dense)
    by_hand = hw.prune(dense, plan)
    done = hw.repair(by_hand, batches, dense)
    small = hw.prune(dense, plan, repair=iter(batches))
    for key, value in by_hand.state_dict().items():
        assert torch.equal(small.state_dict()[key], value), key
    assert [layer.name for layer in done] == list(hw.attention_layers(dense))
    assert all(layer.error_after <= layer.error_before for layer in done)
    assert any(layer.error_after < 0.9 * layer.error_before for layer in done)
    assert hw.prune(dense, plan, repair=batches, inplace=True) is dense
    for key, value in by_hand.state_dict().items():
        assert torch.equal(dense.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
def test_models_run_under_autocast_are_repaired(name):
    """Weights in float32 whose layers write bfloat16: rounding is not an error of the repair."""
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    dense = hw.convert(row.build())
    batches = [row.inputs() for _ in range(10)]
    # Outputs far from 0, where bfloat16 rounds by more than float32's tolerance.
    for layer in hw.attention_layers(dense).values():
        nn.init.normal_(layer.output_projection.weight, std=2.0)

    def low(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return call_model(model, batch)

    small = hw.prune(dense, half_plan(dense))
    done = hw.repair(small, batches, dense, forward_fn=low)
    assert all(layer.error_after <= layer.error_before for layer in done)
    assert next(small.parameters()).dtype == torch.float32


def test_a_structure_plan_is_repaired_too():
    dense, batches = tiny_bert(), batches_of(30)
    found = hw.pruning.structure(dense)
    neurons = [
        hw.pruning.FfnPlan(name, count, list(range(0, count, 2)))
        for name, count in found.neurons.items()
    ]
    plan = hw.pruning.StructurePlan(half_plan(dense), neurons)
    small = hw.prune(dense, plan, repair=batches)
    done = hw.repair(hw.prune(dense, plan), batches, dense)
    assert {layer.name for layer in done} == {*found.attention, *found.ffn}
    assert [layer.name for layer in done][1] in found.ffn  # in the order in which they run
    assert all(layer.error_after <= layer.error_before for layer in done)

    def distance(model):
        with torch.no_grad():
            return sum(
                (model(**b).logits - dense(**b).logits).square().sum().item() for b in batches
            )

    assert distance(small) < 0.5 * distance(hw.prune(dense, plan))


def test_networks_that_lost_nothing_can_make_up_for_attention():
    dense, batches = tiny_bert(), batches_of(40)
    found = hw.pruning.structure(dense)

    def done(**kwargs):
        layers = hw.repair(hw.prune(dense, half_plan(dense)), batches, dense, **kwargs)
        return {layer.name: layer for layer in layers}

    assert set(done()) == set(found.attention)
    everything = done(all_networks=True)
    assert set(everything) == {*found.attention, *found.ffn}
    network = everything[next(iter(found.ffn))]
    assert network.error_after < network.error_before  # what attention left undone
    first = next(iter(found.attention))
    assert set(done(layers=[first])) == {first}


def test_blocks_that_are_finished_need_not_run_again(monkeypatch):
    dense, batches = tiny_bert(num_hidden_layers=4), batches_of()
    small = hw.prune(dense, half_plan(dense), repair=batches)
    replay = Replay(dense, batches, call_model)
    assert replay.blocks == list(dense.bert.encoder.layer)
    monkeypatch.setattr(Replay, "block_of", lambda self, name: None)  # every run from the input
    monkeypatch.setattr(Replay, "read_tokens", lambda self, i: None)
    again = hw.prune(dense, half_plan(dense), repair=batches)
    for name, own in hw.attention_layers(small).items():
        if ".3." in name:  # of the last layer only the first token counts
            continue
        other = hw.attention_layers(again)[name]
        torch.testing.assert_close(own.out_proj.weight, other.out_proj.weight, rtol=1e-4, atol=1e-4)


def test_blocks_with_a_forward_of_their_own_keep_it():
    dense, batches = tiny_bert(), batches_of(3)
    block = dense.bert.encoder.layer[0]
    calls, plain = [], block.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = forward  # as accelerate does
    assert Replay(dense, batches, call_model).blocks == []
    assert block.forward is forward and calls


def test_of_the_last_layer_only_the_tokens_count_that_are_read():
    dense, batches = tiny_bert(), batches_of()
    small = hw.prune(dense, half_plan(dense))
    done = hw.repair(small, batches, dense)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    assert [layer.tokens for layer in done] == [tokens, sequences]


def test_padding_does_not_count():
    dense, batches = tiny_bert(), batches_of()
    small = hw.prune(dense, half_plan(dense), repair=batches)
    for batch in batches:
        hidden = batch["attention_mask"] == 0
        batch["input_ids"] = torch.where(hidden, 7, batch["input_ids"])
    other = hw.prune(dense, half_plan(dense), repair=batches)
    for key, value in small.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_members_are_served_first_and_steadied_by_the_others():
    dense, batches = tiny_bert(), batches_of(12)
    count = sum(len(batch["input_ids"]) for batch in batches)
    members = torch.arange(count) % 3 == 0

    def distance(rows, **kwargs):
        small = hw.prune(dense, half_plan(dense))
        hw.repair(small, batches, dense, **kwargs)
        found = [(small(**b)[0] - dense(**b)[0]).square().mean(1) for b in batches]
        return torch.cat(found)[rows].mean().item()

    with torch.no_grad():
        assert distance(members, members=members) < distance(members)
        few = torch.arange(count) < 2  # both are fitted: no ridge can be chosen by held-out texts
        assert distance(few, members=few) < distance(few)
    for wrong in (members[1:], members.int(), torch.zeros(count, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"members must be bool \[N\] with at least one"):
            hw.repair(hw.prune(dense, half_plan(dense)), batches, dense, members=wrong)


def test_models_are_left_as_they_were():
    dense, batches = tiny_bert().train(), batches_of()
    small = hw.prune(dense, half_plan(dense))
    small.bert.embeddings.eval()
    hw.repair(small, batches, dense)
    assert dense.training and small.training and not small.bert.embeddings.training
    for model in (dense, small):
        assert all(layer._probe is None for layer in hw.attention_layers(model).values())
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_layer_without_heads_gets_the_mean():
    dense, batches = tiny_bert(), batches_of()
    plan = half_plan(dense, heads=())
    small = hw.prune(dense, plan, repair=batches)
    first, layer = (
        hw.attention_layers(m)["bert.encoder.layer.0.attention.self.mha"] for m in (dense, small)
    )
    written = []
    first.register_forward_hook(lambda module, args, output: written.append(output[0]))
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    rows = [y[b["attention_mask"] == 1] for y, b in zip(written, batches, strict=True)]
    torch.testing.assert_close(layer.out_proj.bias, torch.cat(rows).mean(0), rtol=1e-4, atol=1e-4)


def test_layers_under_a_gate_are_repaired():
    dense, batches = tiny_bert(), batches_of(20)
    gated = hw.mask(copy.deepcopy(dense), half_plan(dense))
    hw.repair(gated, batches, dense)
    small = hw.prune(dense, half_plan(dense), repair=batches)
    with torch.no_grad():
        a, b = (m(**batches[0]).logits for m in (gated, small))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)  # other columns, another ridge
    torch.manual_seed(0)
    dynamic = hw.convert(copy.deepcopy(dense), gate=hw.BudgetGate(budget=0.5)).eval()
    done = hw.repair(dynamic, batches, dense)
    assert all(layer.error_after <= layer.error_before for layer in done)
    assert any(layer.ridge is not None for layer in done)


def test_decoders_can_be_given_a_bias():
    torch.manual_seed(0)
    row = ARCHITECTURES["LlamaForCausalLM"]
    dense = hw.convert(row.build())
    batches = [row.inputs() for _ in range(10)]
    plain, biased = (hw.prune(dense, half_plan(dense)) for _ in range(2))
    without = hw.repair(plain, batches, dense)
    with_bias = hw.repair(biased, batches, dense, bias=True)
    assert all(layer.o_proj.bias is None for layer in hw.attention_layers(plain).values())
    assert all(layer.o_proj.bias is not None for layer in hw.attention_layers(biased).values())
    assert with_bias[0].error_after < without[0].error_after


def test_repaired_models_are_saved_and_loaded(tmp_path):
    dense, batches = tiny_bert(), batches_of()
    small = hw.prune(dense, half_plan(dense), repair=batches)
    hw.save(small, tmp_path / "small")
    loaded = hw.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batches[0]).logits, small(**batches[0]).logits)


def test_repair_says_what_is_wrong():
    dense, batches = tiny_bert(), batches_of(2)
    small = hw.prune(dense, half_plan(dense))
    with pytest.raises(ValueError, match="batches must not be empty: there is nothing to repair"):
        hw.repair(small, [], dense)
    with pytest.raises(ValueError, match="has no headwise.MultiheadAttention"):
        hw.repair(nn.Linear(2, 2), batches, dense)
    with pytest.raises(ValueError, match="forward_fn must run model"):
        hw.repair(small, batches, dense, forward_fn=lambda model, batch: None)
    with pytest.raises(
        ValueError, match="dense must have the layers of model, but has no 'bert.enc"
    ):
        hw.repair(small, batches, tiny_bert(num_hidden_layers=1))
    row = ARCHITECTURES["MultiheadAttention"]
    plain = hw.convert(row.build())
    nothing = row.inputs()
    nothing["key_padding_mask"][:] = True
    with pytest.raises(ValueError, match="batches must have tokens that are not padding for layer"):
        hw.repair(hw.prune(plain, half_plan(plain)), [nothing], plain)
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="activations of layer 'bert.*': targets must be finite"):
        hw.repair(small, batches, broken)
    wider = hw.convert(bert("BertForSequenceClassification", num_labels=3, hidden_size=2 * EMBED))
    with pytest.raises(ValueError, match=r"must be as wide in model as in dense, got 24 and 48"):
        hw.repair(small, batches, wider)


def test_few_tokens_are_named_and_regularised():
    dense = tiny_bert()
    small = hw.prune(dense, half_plan(dense))
    batch = [{"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}]
    with pytest.warns(UserWarning, match=r"fewer tokens .* \(3 for \d+ in layer 'bert") as found:
        hw.repair(small, batch, dense)
    assert len(found) == 1  # not one per layer
    assert all(torch.isfinite(p).all() for p in small.parameters())
    assert bert_mask().shape == (3, 7)


# --- which heads to remove ---


def test_scores_remove_first_the_head_that_another_stands_in_for():
    dense, batches = tiny_bert(), batches_of(20)
    twin_heads(dense)
    scores = hw.pruning.repair_scores(dense, batches)
    assert scores.metric == "repair" and list(scores.values) == list(hw.attention_layers(dense))
    for values in scores.values.values():
        least = int(values.argmin())
        assert least in (0, 1) and values[least] < 1e-3  # the other twin takes over
        assert (values.sort().values[1:] > 10 * values[least]).all()
    plan = hw.plan(scores, keep=0.75)
    done = hw.repair(hw.prune(dense, plan), batches, dense, ridges=(1e-9,))
    assert all(layer.error_after < 1e-3 for layer in done)


def test_scores_are_the_increases_of_the_repaired_error():
    dense, batches = tiny_bert(), batches_of(20)
    name, layer = next(iter(hw.attention_layers(dense).items()))
    scores = hw.pruning.repair_scores(dense, batches, ridge=1e-9).values[name]
    contexts, written = [], []

    def probe(module, seen):
        valid = ~seen.query_padding_mask
        context = seen.context.transpose(1, 2).flatten(2)
        contexts.append(context[valid])
        written.append(layer.out_proj(context)[valid])

    layer._probe = probe
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    x, y = torch.cat(contexts).double(), torch.cat(written).double()
    d, left, before, largest = layer.head_dim, [0, 1, 2, 3], 0.0, 0.0

    def error(heads):
        columns = [head * d + i for head in heads for i in range(d)]
        inputs = torch.cat([x[:, columns], torch.ones(len(x), 1)], 1)
        return (y - inputs @ torch.linalg.lstsq(inputs, y).solution).square().sum(1).mean().item()

    spread = (y - y.mean(0)).square().sum(1).mean().item()
    while left:
        errors = {head: error([other for other in left if other != head]) for head in left}
        head = min(errors, key=errors.get)
        largest = max(largest, (errors[head] - before) / spread)
        assert scores[head].item() == pytest.approx(largest, rel=1e-3, abs=1e-6)
        before = errors[head]
        left.remove(head)


def test_groups_are_scored_as_one():
    torch.manual_seed(0)
    row = ARCHITECTURES["LlamaForCausalLM"]
    dense = hw.convert(row.build())
    batches = [row.inputs() for _ in range(10)]
    scores = hw.pruning.repair_scores(dense, batches, groups=True)
    for values in scores.values.values():
        assert values[0] == values[1] != values[2] == values[3]
    small = hw.prune(dense, hw.plan(scores, keep=0.5, groups=hw.nn.head_groups(dense)))
    assert sum(layer.num_heads for layer in hw.attention_layers(small).values()) == 4
    with pytest.raises(ValueError, match="batches must not be empty: there is nothing to score"):
        hw.pruning.repair_scores(dense, [])
    uneven = hw.prune(dense, half_plan(dense, heads=(0, 1, 2)))
    with pytest.raises(ValueError, match=r"must be of one size, got \[2, 1\]"):
        hw.pruning.repair_scores(uneven, batches, groups=True)
