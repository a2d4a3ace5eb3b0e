"""headwise.explain for gates whose heads compete over layers, are shared, or need no training."""

import copy

import headwise as hw
import pytest
import torch
from support.architectures import bert, bert_inputs
from support.explained import heads_of, trained

OPS = torch.ops.headwise

GATES = {
    "subset of the model": lambda: hw.SubsetGate(k=3),
    "subset of each layer": lambda: hw.SubsetGate(k=2, scope="layer"),
    "requested": lambda: hw.RequestedBudgetGate(budget=0.4),
    "requested of each layer": lambda: hw.RequestedBudgetGate(budget=0.6, scope="layer"),
    "gumbel sigmoid": lambda: hw.GumbelSigmoidGate(keep=0.5),
    "sleep": lambda: hw.SleepGate(keep=0.5),
    "threshold": lambda: hw.ThresholdGate(threshold=2.0, resolution=4.0, min_heads=2),
    "threshold, approximate": lambda: hw.ThresholdGate(
        threshold=1.0, resolution=2.0, approximate=True
    ),
    "shared, budget": lambda: hw.SharedHeadsGate(hw.BudgetGate(keep=0.5), shared=[1]),
    "shared, subset": lambda: hw.SharedHeadsGate(hw.SubsetGate(k=2), shared=[0, 2]),
    "shared, fixed": lambda: hw.SharedHeadsGate(hw.FixedGate(scale=[0.0, 1.0, 0.5]), shared=1),
}


def classifier(name):
    torch.manual_seed(4)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3), GATES[name]())
    for layer in hw.attention_layers(model).values():
        gate = layer.gate.gate if isinstance(layer.gate, hw.SharedHeadsGate) else layer.gate
        if isinstance(gate, hw.FixedGate | hw.ThresholdGate):
            continue
        if isinstance(gate, hw.SleepGate):
            with torch.no_grad():
                gate.score.uniform_(0.5, 1.5)
            continue
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.normal_()
            if hasattr(gate, "feature_mean"):
                gate.feature_mean.normal_()
                gate.feature_variance.uniform_(0.2, 2.0)
    if "sleep" in name:
        layers = list(hw.attention_layers(model).values())
        layers[0].gate.awake.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]))
        layers[1].gate.awake.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    hw.anneal(model, 1.0)
    return model


@pytest.fixture(params=GATES, ids=str)
def explained(request):
    """(model, inputs, its trace, its explanation)"""
    model, inputs = classifier(request.param), bert_inputs()
    with hw.trace(model) as t, torch.no_grad():
        model(**inputs)
    return model, inputs, t, hw.explain(model, inputs, batch_size=3)


def gates_of(model):
    return [layer.gate for layer in hw.attention_layers(model).values()]


def test_the_grid_is_what_ran_and_shares_add_up(explained):
    model, inputs, t, result = explained
    names = list(hw.attention_layers(model))
    lengths = inputs["attention_mask"].sum(1).tolist()
    for b, site, gate, head in heads_of(result):
        selection, own = t.selections[names[site]], gates_of(model)[site]
        chosen = selection.index[b, : selection.count[b]].tolist()
        assert head["on"] == (head["head"] in chosen)
        assert head["weight"] == pytest.approx(selection.weight[b, head["head"]].item(), abs=1e-5)
        assert gate["count"] == len(chosen) and gate["how"].endswith(".")
        shared = isinstance(own, hw.SharedHeadsGate) and head["head"] in own.shared.tolist()
        inner = own.gate if isinstance(own, hw.SharedHeadsGate) else own
        if shared or isinstance(inner, hw.FixedGate):
            for key in ("relevance", "rank", "margin", "constant", "shares"):
                assert head[key] is None
            if shared and not isinstance(inner, hw.FixedGate):
                assert head["budget_needed"] == 0
            continue
        expected = selection.relevance[b, head["head"]].item()
        assert head["relevance"] == pytest.approx(expected, abs=1e-5)
        if hasattr(inner, "feature_mean"):
            assert len(head["shares"]) == lengths[b]
            total = head["constant"] + sum(head["shares"])
            assert total == pytest.approx(head["relevance"], abs=1e-5)
        elif isinstance(inner, hw.ThresholdGate):
            assert head["shares"] is head["constant"] is None
        else:
            assert head["shares"] is None
            assert head["constant"] == pytest.approx(head["relevance"], abs=1e-5)


def test_the_prediction_and_the_effects_are_those_of_the_model_as_it_runs(explained):
    model, inputs, t, result = explained
    with torch.no_grad():
        scores = model(**inputs).logits.double().log_softmax(1)
    for b, entry in enumerate(result.inputs):
        predicted = entry["prediction"]["class"]
        assert predicted == scores[b].argmax()
        assert entry["prediction"]["log_probability"] == pytest.approx(
            scores[b, predicted].item(), abs=1e-5
        )
    # One head of the second layer toggled, by the layer's own gate.
    layer = list(hw.attention_layers(model).values())[1]
    gate = layer.gate

    def switched(module, args, chosen):
        weight = chosen.weight.clone()
        weight[:, 2] = (weight[:, 2] == 0).to(weight.dtype)
        return chosen._replace(weight=weight, index=every, count=count)

    batch = len(inputs["input_ids"])
    every = torch.arange(4, dtype=torch.int32).expand(batch, 4)
    count = torch.full((batch,), 4, dtype=torch.int32)
    handle = gate.register_forward_hook(switched)
    with torch.no_grad():
        after = model(**inputs).logits.double().log_softmax(1)
    handle.remove()
    for b, entry in enumerate(result.inputs):
        head, predicted = entry["layers"][1]["heads"][2], entry["prediction"]["class"]
        change = (scores - after)[b, predicted].item() * (1 if head["on"] else -1)
        assert head["effect"] == pytest.approx(change, abs=1e-5)


def test_heads_of_all_layers_compete_where_the_gate_says_so():
    for name, among in (("subset of the model", 8), ("subset of each layer", 4), ("sleep", 8)):
        model = classifier(name)
        entry = hw.explain(model, bert_inputs(), effects=False).inputs[0]
        held = {}
        for layer, gate in zip(entry["layers"], gates_of(model), strict=True):
            score = gate.score * (1 + gate.margin * gate.awake) if name == "sleep" else gate.scores
            held.update(((layer["site"], h), v) for h, v in enumerate(score.tolist()))
            assert layer["gate"]["ranked"] == among
            assert layer["gate"]["rule"] == ("awake" if name == "sleep" else "rank")
        on = {
            (layer["site"], h["head"])
            for layer in entry["layers"]
            for h in layer["heads"]
            if h["on"]
        }
        for layer in entry["layers"]:
            field = [key for key in held if among == 8 or key[0] == layer["site"]]
            for head in layer["heads"]:
                own = (layer["site"], head["head"])
                assert head["rank"] == 1 + sum(held[key] > held[own] for key in field)
                others = [held[key] for key in field if (key in on) != head["on"]]
                cut = max(others) if head["on"] else min(others)
                assert head["margin"] == pytest.approx(held[own] - cut, abs=1e-5)
                if name != "sleep":
                    assert (head["margin"] > 0) == head["on"]
                assert head["budget_needed"] == pytest.approx(
                    0 if head["rank"] == 1 else (head["rank"] - 0.5) / among
                )


@pytest.mark.parametrize("name", ["requested", "requested of each layer"])
def test_the_smallest_request_at_which_a_head_runs_is_told(name):
    model, inputs = classifier(name), bert_inputs()
    result = hw.explain(model, inputs, effects=False)
    first = result.inputs[1]["layers"][0]  # the second layer's input changes with the first's heads
    assert first["gate"]["budget"]["value"] == pytest.approx(gates_of(model)[0].budget)
    assert first["gate"]["budget"]["attribution"] is None
    for head in first["heads"]:
        needed = head["budget_needed"]
        for asked, runs in ((needed, True), (needed - 0.001, False)):
            if asked <= 0:
                continue
            hw.request_budget(model, asked)
            again = hw.explain(model, inputs, effects=False).head(0, head["head"], input=1)
            assert again["on"] == runs


def test_threshold_gates_say_how_far_from_the_cut_each_head_is():
    importance = torch.tensor([[5.0, 1.0, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0]])

    class Given(hw.ThresholdGate):
        def forward(self, x, key_padding_mask=None, heads=None):
            index, count = OPS.select_above(importance, self.threshold, self.min_heads)
            weight = OPS.selection_mask(index, count, x.dtype)
            return hw.Selection(index, count, weight, importance)

    for threshold, least in ((2.5, 0), (2.5, 1), (2.5, 3), (4.0, 2), (10.0, 2), (1.5, 4)):
        gate = Given(threshold=threshold, min_heads=least).bind(12, 4)
        layer = hw.MultiheadAttention(12, 4, gate=gate, batch_first=True).eval()
        x = torch.randn(2, 3, 12)
        result = hw.explain(layer, (x, x, x), forward_fn=lambda m, i: m(*i)[0])
        for b, _, found, head in heads_of(result):
            assert found["threshold"] == threshold
            if least == 4:
                assert head["margin"] is None and head["on"]
                continue
            for move, same in ((-0.999, True), (-1.001, False)):
                moved = importance[b].clone()
                moved[head["head"]] += move * head["margin"]
                index, count = OPS.select_above(moved[None], gate.threshold, least)
                assert (head["head"] in index[0, : count[0]].tolist()) == (head["on"] == same)


def test_every_gate_says_in_a_sentence_how_it_decides():
    found = {
        name: hw.explain(classifier(name), bert_inputs(), effects=False).inputs[0]["layers"][0]
        for name in GATES
    }
    how = {name: layer["gate"]["how"] for name, layer in found.items()}
    assert how["subset of the model"].startswith("The heads of all layers with the largest scores")
    assert how["subset of each layer"].startswith("The layer's heads with the largest scores")
    assert how["requested"].startswith("The budget is requested at run time and divided among")
    assert "within it the layer's heads" in how["requested of each layer"]
    assert "probability that it is open is above one half" in how["gumbel sigmoid"]
    assert "Training put the heads of all layers" in how["sleep"]
    assert how["threshold"].startswith("Nothing was learned: ")
    assert how["threshold"].endswith("is above 2; at least 2 heads run.")
    assert how["shared, budget"].startswith("Head 1 runs for every input; of the others: a network")
    assert how["shared, subset"].startswith("Heads 0 and 2 run for every input; of the others: the")
    assert how["shared, fixed"].endswith("of the others: the same heads run for every input: they "
                                         "were fixed beforehand.")  # fmt: skip
    assert found["gumbel sigmoid"]["gate"]["rule"] == "threshold"
    assert found["shared, budget"]["gate"]["ranked"] == 3
    assert found["shared, fixed"]["gate"]["rule"] == "fixed"


def test_a_shared_gate_inside_is_explained_as_it_would_be_alone():
    model = classifier("shared, budget")
    layer = next(iter(hw.attention_layers(model).values()))
    alone = hw.MultiheadAttention(24, 3, head_dim=6, batch_first=True)
    alone.set_gate(copy.deepcopy(layer.gate.gate))
    x = torch.randn(2, 5, 24)
    forward = lambda module, inputs: module(*inputs)[0]  # noqa: E731
    whole = hw.explain(layer.eval(), (x, x, x), forward_fn=forward).inputs
    inner = hw.explain(alone.eval(), (x, x, x), forward_fn=forward).inputs
    for one, other in zip(whole, inner, strict=True):
        gate, own = one["layers"][0]["gate"], other["layers"][0]["gate"]
        assert gate["budget"] == own["budget"] and gate["count"] == own["count"] + 1
        for head, routed in zip((0, 2, 3), other["layers"][0]["heads"], strict=True):
            for key in ("relevance", "rank", "margin", "constant", "shares", "budget_needed"):
                assert one["layers"][0]["heads"][head][key] == routed[key]


def test_a_static_hard_concrete_gate_wrapped_and_a_gate_of_ones_own():
    class Own(hw.RandomGate):
        pass

    torch.manual_seed(0)
    model = trained(hw.convert(bert("BertForSequenceClassification", num_labels=3)))
    for layer in hw.attention_layers(model).values():
        layer.set_gate(Own(keep=0.5))
    gate = hw.explain(model, bert_inputs(), effects=False).inputs[0]["layers"][0]["gate"]
    assert gate["how"] == ("A custom gate, Own: its relevance is known, but not how it "
                           "is computed.")  # fmt: skip


def banked(names, at=1):
    """A classifier with a bank whose router is random."""
    torch.manual_seed(5)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3))
    for layer in hw.attention_layers(model).values():
        plans = [[number % 4, 3] if number % 4 < 3 else [0, 1] for number in range(len(names))]
        layer.set_gate(hw.gates.BankGate(plans, at=at, names=names))
        layer.gate.router_weight.normal_()
    return hw.link_gates(model.eval())


def test_an_input_of_a_bank_is_told_its_plan():
    model, inputs = banked(["mails", "chats", "code"]), bert_inputs()
    result = hw.explain(model, inputs)
    deciding = list(hw.attention_layers(model).values())[1].gate
    seen = []
    with (
        torch.no_grad(),
        deciding.register_forward_hook(
            lambda gate, args, output: seen.append(gate.scores(*args[:2]))
        ),
    ):
        model(**inputs)
    best = seen[0].double().topk(2).values  # [B, 2]
    for row, entry in enumerate(result.inputs):
        plan = entry["plan"]
        assert plan["plans"] == ["mails", "chats", "code"]
        assert plan["name"] == plan["plans"][plan["plan"]] and plan["next_plan"] != plan["plan"]
        torch.testing.assert_close(plan["scores"], seen[0][row].tolist())
        assert plan["margin"] == pytest.approx((best[row, 0] - best[row, 1]).item(), abs=1e-5)
        on = [head["head"] for head in entry["layers"][1]["heads"] if head["on"]]
        assert on == deciding.plans[plan["plan"]]
        following = plan["plans"][plan["next_plan"]]
        assert (
            f"It follows plan '{plan['name']}', one of 3: the router scores it "
            in result.summary(row)
        )
        assert f"above the next, '{following}'." in result.summary(row)
        assert "custom gate" not in result.summary(row)
        assert all(
            layer["gate"]["how"].startswith("A bank of 3 plans: the input of attention layer 1")
            for layer in entry["layers"]
        )


def test_a_bank_with_one_plan_has_no_next():
    result = hw.explain(banked(["all"], at=0), bert_inputs())
    plan = result.inputs[0]["plan"]
    assert plan["margin"] is plan["next_plan"] is None
    assert "It follows the bank's only plan, 'all'." in result.summary()


def test_other_gates_have_no_plan_and_python_gates_are_named():
    model = hw.convert(
        bert("BertForSequenceClassification", num_labels=3),
        hw.MixtureOfHeadsGate(keep=0.5, shared=1, routing="sequence"),
    )
    entry = hw.explain(model, bert_inputs()).inputs[0]
    assert entry["plan"] is None
    assert entry["layers"][0]["gate"]["how"] == (
        "1 head runs for every input; of the others, those that a learned router scores highest "
        "for the mean of its tokens."
    )
