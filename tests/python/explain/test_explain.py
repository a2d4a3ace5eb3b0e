"""headwise.explain for one batch: every number against its definition, for every kind of gate."""

import copy
import itertools
import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.tasks.models import load_trained
from support.architectures import ARCHITECTURES, bert, bert_inputs
from support.explained import heads_of, trained
from torch import nn

OPS = torch.ops.headwise

GATES = {
    "budget": lambda: hw.BudgetGate(keep=0.5),
    "budget, ceil, soft, two at least": lambda: hw.BudgetGate(
        keep=0.4, rounding="ceil", kept_weight="soft", min_heads=2
    ),
    "budget, fixed": lambda: hw.BudgetGate(budget=0.5),
    "hard concrete": lambda: hw.HardConcreteGate(keep=0.5, input_dependent=True),
    "hard concrete, one": lambda: hw.HardConcreteGate(
        keep=0.5, input_dependent=True, kept_weight="one"
    ),
    "hard concrete, static": lambda: hw.HardConcreteGate(keep=0.5),
    "random": lambda: hw.RandomGate(keep=0.5),
    "fixed": lambda: hw.FixedGate(scale=[1.0, 0.0, 0.5, 1.0]),
    "none": lambda: None,
}


def classifier(gate) -> nn.Module:
    torch.manual_seed(3)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3))
    if gate is not None:
        hw.convert(model, gate)
    return trained(model)


@pytest.fixture(params=GATES, ids=str)
def explained(request):
    """(model, inputs, its trace, its explanation)"""
    model = classifier(GATES[request.param]())
    inputs = bert_inputs()
    torch.manual_seed(1)
    with hw.trace(model) as t, torch.no_grad():
        model(**inputs)
    torch.manual_seed(1)  # a random gate draws the same
    return model, inputs, t, hw.explain(model, inputs, maps="all", batch_size=3)


def test_the_grid_is_what_ran(explained):
    model, inputs, t, result = explained
    names = list(hw.attention_layers(model))
    for b, site, gate, head in heads_of(result):
        layer = result.inputs[b]["layers"][site]
        assert (layer["name"], layer["call"], layer["num_heads"]) == (names[site], 0, 4)
        if not t.layers:
            assert (gate["type"], gate["rule"], head["on"]) == ("none", "none", True)
            assert head["relevance"] is gate["budget"] is gate["count"] is None
            continue
        selection = t.selections[names[site]]
        chosen = selection.index[b, : selection.count[b]].tolist()
        assert head["on"] == (head["head"] in chosen)
        assert gate["count"] == selection.count[b]
        assert head["weight"] == pytest.approx(selection.weight[b, head["head"]].item(), abs=1e-5)
        if selection.relevance is None:
            assert gate["rule"] == "fixed" and head["relevance"] is None and head["rank"] is None
        else:
            expected = selection.relevance[b, head["head"]].item()
            assert head["relevance"] == pytest.approx(expected, abs=1e-5)
        if selection.budget is None:
            assert gate["budget"] is None
        else:
            assert gate["budget"]["value"] == pytest.approx(selection.budget[b].item(), abs=1e-5)
    for entry in result.inputs:
        assert entry["heads"] == 8
        on = sum(head["on"] for layer in entry["layers"] for head in layer["heads"])
        assert entry["heads_on"] == on


def test_shares_of_tokens_sum_to_the_relevance(explained):
    model, inputs, t, result = explained
    lengths = inputs["attention_mask"].sum(1).tolist()
    for b, site, gate, head in heads_of(result):
        layer = list(hw.attention_layers(model).values())[site]
        if hasattr(layer.gate, "feature_mean"):
            assert len(head["shares"]) == lengths[b]
            total = head["constant"] + sum(head["shares"])
            assert total == pytest.approx(head["relevance"], abs=1e-5)
            base = layer.gate.base if gate["type"] == "BudgetGate" else layer.gate.log_alpha
            assert head["constant"] == pytest.approx(base[head["head"]].item(), abs=1e-5)
        else:
            assert head["shares"] is None


def test_ranks_and_margins_follow_their_definitions(explained):
    result = explained[-1]
    for entry in result.inputs:
        for layer in entry["layers"]:
            gate, heads = layer["gate"], layer["heads"]
            if gate["rule"] in ("none", "fixed"):
                assert all(head["margin"] is None for head in heads)
                continue
            ranked = sorted(heads, key=lambda head: (-head["relevance"], head["head"]))
            assert [head["rank"] for head in ranked] == [1, 2, 3, 4]
            for head in heads:
                if gate["rule"] == "threshold":
                    expected = head["relevance"] - gate["threshold"]
                else:
                    others = [h["relevance"] for h in heads if h["on"] != head["on"]]
                    if not others:
                        assert head["margin"] is None
                        continue
                    expected = head["relevance"] - (max(others) if head["on"] else min(others))
                assert head["margin"] == pytest.approx(expected, abs=1e-5)
                assert (head["margin"] > 0) == head["on"]


def test_the_smallest_budget_is_where_the_count_reaches_the_head():
    rank = torch.tensor([[3, 1, 5, 2, 4]])
    for rounding, least in itertools.product(("round", "ceil"), (0, 1, 3)):
        needed = OPS.budget_needed(rank, least, rounding)[0]  # [H]
        above = OPS.budget_count((needed + 1e-6).clamp(max=1.0), 5, least, rounding)
        below = OPS.budget_count(needed - 1e-6, 5, least, rounding)
        assert (above >= rank[0]).all()
        assert ((below < rank[0]) | (rank[0] <= least)).all()
        assert (needed[rank[0] <= least] == 0).all()


def test_budgets_that_a_network_predicts_are_attributed(explained):
    model, inputs, t, result = explained
    predicted = [
        isinstance(layer.gate, hw.BudgetGate) and layer.gate.fixed_budget is None
        for layer in hw.attention_layers(model).values()
    ]
    for entry in result.inputs:
        for layer in entry["layers"]:
            budget = layer["gate"]["budget"]
            if not predicted[layer["site"]]:
                assert budget is None or budget["attribution"] is None
                continue
            given = budget["attribution"]
            assert budget["value"] == pytest.approx(
                min(max(budget["asked"], budget["min"]), budget["max"]), abs=1e-5
            )
            change = budget["asked"] - given["baseline"]
            assert given["completeness_error"] < 1e-6
            assert sum(given["tokens"]) == pytest.approx(change, abs=1e-5)
            assert len(given["tokens"]) == layer["queries"]


def test_integrated_gradients_against_a_plain_sum():
    torch.manual_seed(0)
    gate = trained(hw.MultiheadAttention(12, 4, gate=hw.BudgetGate(), batch_first=True)).gate.eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    gate = gate.double()

    def asked(features):
        network = (gate.budget_hidden.weight, gate.budget_hidden.bias)
        out = (gate.budget_out.weight, gate.budget_out.bias)
        fixed = (gate.progress, False, 0.0, 1.0, gate.keep, gate.initial_keep, gate.warmup)
        return OPS.head_budget(features, *network, *out, *fixed, 0.0)[1]

    attribution, baseline, value = OPS.budget_attribution(
        x, mask, gate.feature_mean, gate.feature_variance, gate.budget_hidden.weight,
        gate.budget_hidden.bias, gate.budget_out.weight, gate.budget_out.bias, gate.progress,
        gate.keep, gate.initial_keep, gate.warmup, 24,
    )  # fmt: skip
    features = OPS.standardize(OPS.masked_mean(x, mask), gate.feature_mean, gate.feature_variance)
    slope = torch.zeros_like(features)
    for node in (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000:
        point = (node * features).requires_grad_()
        slope += torch.autograd.grad(asked(point).sum(), point)[0] / 2000
    keep = (~mask).double()
    keep = keep / keep.sum(1, keepdim=True)
    each = OPS.standardize(x.flatten(0, 1), gate.feature_mean, gate.feature_variance).view_as(x)
    torch.testing.assert_close(
        attribution, (each * slope[:, None]).sum(2) * keep, rtol=0, atol=1e-7
    )
    torch.testing.assert_close(value, asked(features))
    torch.testing.assert_close(baseline, asked(torch.zeros_like(features)))


def test_effects_are_those_of_a_model_with_the_head_switched_over(explained):
    model, inputs, t, result = explained
    held = copy.deepcopy(model)
    layers = list(hw.attention_layers(held).values())
    for b, entry in enumerate(result.inputs):
        row = {name: value[b : b + 1] for name, value in inputs.items()}

        def scores(weights, row=row):
            for layer, weight in zip(layers, weights, strict=True):
                layer.set_gate(hw.FixedGate(scale=weight))
            with torch.no_grad():
                return held(**row).logits.double().log_softmax(1)[0]

        weights = [[head["weight"] for head in layer["heads"]] for layer in entry["layers"]]
        before = scores(weights)
        predicted = entry["prediction"]["class"]
        assert predicted == before.argmax()
        assert entry["prediction"]["log_probability"] == pytest.approx(
            before[predicted].item(), abs=1e-5
        )
        for site, layer in enumerate(entry["layers"]):
            for head in layer["heads"]:
                switched = copy.deepcopy(weights)
                switched[site][head["head"]] = 0.0 if head["on"] else 1.0
                after = scores(switched)
                change = (before - after)[predicted].item() * (1 if head["on"] else -1)
                assert head["effect"] == pytest.approx(change, abs=1e-5)
                assert head["changes_prediction"] == (after.argmax().item() != predicted)


def test_agreement_is_the_rank_correlation_of_relevance_and_effect(explained):
    for entry in explained[-1].inputs:
        found = entry["agreement"]
        if entry["layers"][0]["gate"]["rule"] in ("none", "fixed"):
            assert found is None
            continue
        for layer, value in zip(entry["layers"], found["sites"], strict=True):
            order = [
                sorted(range(4), key=lambda h, key=key: layer["heads"][h][key])
                for key in ("relevance", "effect")
            ]
            ranks = [[row.index(h) for h in range(4)] for row in order]
            squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
            assert value == pytest.approx(1 - 6 * squares / (4 * 15), abs=1e-3)
        assert found["mean"] == pytest.approx(sum(found["sites"]) / 2, abs=1e-3)


def test_maps_entropies_and_pairs_are_those_of_the_attention(explained):
    model, inputs, t, result = explained
    seen = []
    torch.manual_seed(1)
    with torch.no_grad(), hw.nn.instrument(model) as opened:
        opened.probe(lambda name, layer, probe: seen.append(probe))
        model(**inputs)
    for b, site, _, head in heads_of(result):
        probe = seen[site]
        kept = (inputs["attention_mask"][b] == 1).nonzero().flatten()
        full = OPS.attention_probabilities(probe.q, probe.k, probe.key_padding_mask)
        expected = full[b, head["head"]][kept][:, kept]
        actual = torch.tensor(head["attention"])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        entropy = -(expected * expected.clamp_min(1e-30).log()).sum(1).mean()
        entropy = entropy / torch.tensor(float(len(kept))).log()
        assert head["entropy"] == pytest.approx(entropy.item(), abs=1e-4)
        assert head["confidence"] == pytest.approx(expected.amax(1).mean().item(), abs=1e-4)
        weights = [pair["weight"] for pair in head["pairs"]]
        assert weights == sorted(weights, reverse=True) and len(weights) == min(5, len(kept) ** 2)
        assert weights[0] == pytest.approx(expected.max().item(), abs=1e-4)
        for pair in head["pairs"]:
            assert expected[pair["query"], pair["key"]] == pytest.approx(pair["weight"], abs=1e-4)


def test_an_input_is_explained_alike_alone_and_in_a_padded_batch():
    model = classifier(hw.BudgetGate(keep=0.5))
    inputs = bert_inputs()
    together = hw.explain(model, inputs)
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = hw.explain(model, {k: v[b : b + 1, :length] for k, v in inputs.items()})
        for (_, site, _, head), (_, _, _, other) in zip(
            heads_of(alone),
            [found for found in heads_of(together) if found[0] == b],
            strict=True,
        ):
            for key in ("relevance", "margin", "effect", "entropy", "constant"):
                assert head[key] == pytest.approx(other[key], abs=1e-4), (site, key)
            assert head["shares"] == pytest.approx(other["shares"], abs=1e-5)


def test_the_model_is_left_as_it_was(explained):
    model = explained[0].train()
    layers = hw.attention_layers(model)
    before = {name: (layer.gate, layer._probe) for name, layer in layers.items()}
    hw.explain(model, explained[1])
    assert all(module.training for module in model.modules())
    assert {name: (layer.gate, layer._probe) for name, layer in layers.items()} == before
    assert not any(layer._observers for layer in layers.values())
    with pytest.raises(ZeroDivisionError):
        hw.explain(model, explained[1], forward_fn=lambda m, i: 1 / (m(**i) is None))
    assert {name: (layer.gate, layer._probe) for name, layer in layers.items()} == before
    assert not any(layer._observers for layer in layers.values())


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder", "BertModel"])
def test_models_without_class_scores_are_explained_without_effects(name):
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = trained(hw.convert(architecture.build(), hw.BudgetGate(keep=0.5)))
    inputs = architecture.inputs()
    forward = lambda model, inputs: model(**inputs)  # noqa: E731
    result = hw.explain(model, inputs, forward_fn=forward, maps="all")
    for b, _, _, head in heads_of(result):
        assert result.inputs[b]["prediction"] is None and head["effect"] is None
        total = head["constant"] + sum(head["shares"])
        assert total == pytest.approx(head["relevance"], abs=1e-5)
        assert all(sum(row) == pytest.approx(1.0, abs=0.01) for row in head["attention"])
    with pytest.raises(ValueError, match="effects need class scores"):
        hw.explain(model, inputs, forward_fn=forward, effects=True)


def test_models_that_were_not_converted_or_were_pruned():
    torch.manual_seed(0)
    dense = bert("BertForSequenceClassification", num_labels=2)
    inputs = bert_inputs()
    result = hw.explain(dense, inputs)
    assert not hw.attention_layers(dense)
    assert all(entry["heads_on"] == entry["heads"] == 8 for entry in result.inputs)
    assert all(head["effect"] is not None for *_, head in heads_of(result))
    scores = hw.HeadScores("made up", {
        name: torch.tensor([4.0, 3.0, 2.0, 1.0]) - 2 * place
        for place, name in enumerate(hw.attention_layers(hw.convert(copy.deepcopy(dense))))
    })  # fmt: skip
    small = hw.prune(hw.convert(dense), hw.plan(scores, keep=0.5))
    result = hw.explain(small, inputs)
    assert [len(layer["heads"]) for layer in result.inputs[0]["layers"]] == [3, 1]


def test_layers_without_heads_and_half_precision():
    torch.manual_seed(0)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=2))
    names = list(hw.attention_layers(model))
    values = {names[0]: torch.tensor([4.0, 3.0, 2.0, 1.0]), names[1]: torch.zeros(4)}
    small = hw.prune(model, hw.plan(hw.HeadScores("made up", values), keep=0.5))
    entry = hw.explain(small, bert_inputs()).inputs[0]
    assert [len(layer["heads"]) for layer in entry["layers"]] == [4, 0]
    model = classifier(hw.BudgetGate(keep=0.5)).bfloat16()
    for *_, head in heads_of(hw.explain(model, bert_inputs())):
        assert head["constant"] + sum(head["shares"]) == pytest.approx(head["relevance"], abs=0.5)
        assert head["effect"] is not None


def test_a_gate_of_another_formula_has_no_shares():
    model = classifier(hw.BudgetGate(keep=0.5))
    for layer in hw.attention_layers(model).values():
        layer.gate.register_forward_hook(
            lambda gate, args, chosen: chosen._replace(relevance=chosen.relevance + 1.0)
        )
    for *_, gate, head in heads_of(hw.explain(model, bert_inputs())):
        assert gate["rule"] == "rank" and head["relevance"] is not None
        assert head["shares"] is None and head["constant"] is None


class Repeated(nn.Module):
    """One layer, called three times: shared weights, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.attention = hw.MultiheadAttention(
            12, 4, batch_first=True, gate=hw.BudgetGate(keep=0.5)
        )
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        for _ in range(3):
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1))


def test_a_layer_that_is_called_several_times_has_a_site_for_each_call():
    torch.manual_seed(0)
    model = trained(Repeated())
    x = torch.randn(2, 6, 12)
    result = hw.explain(model, x)
    entry = result.inputs[1]
    assert [(s["name"], s["call"]) for s in entry["layers"]] == [("attention", c) for c in range(3)]
    assert result.document["model"] == {"class": "Repeated", "layers": 1, "sites": 3, "heads": 12}
    weights = [[h["weight"] for h in layer["heads"]] for layer in entry["layers"]]

    def scores(weights):
        y = x[1:]
        for weight in weights:
            model.attention.set_gate(hw.FixedGate(scale=weight))
            y = y + model.attention(y, y, y, need_weights=False)[0]
        return model.out(y.mean(1)).log_softmax(1)[0, entry["prediction"]["class"]].item()

    with torch.no_grad():
        head = entry["layers"][1]["heads"][2]
        switched = copy.deepcopy(weights)
        switched[1][2] = 0.0 if head["on"] else 1.0
        change = scores(weights) - scores(switched)
        assert head["effect"] == pytest.approx(change if head["on"] else -change, abs=1e-5)


def test_a_sequence_of_nothing_but_padding_has_no_shares():
    torch.manual_seed(0)
    layer = trained(hw.MultiheadAttention(12, 4, gate=hw.BudgetGate(), batch_first=True))
    x, padding = torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool)
    result = hw.explain(
        layer,
        {"query": x, "key": x, "value": x, "key_padding_mask": padding, "need_weights": False},
    )
    for *_, head in heads_of(result):
        assert head["shares"] == head["pairs"] == []
        assert head["constant"] == pytest.approx(head["relevance"], abs=1e-5)


def test_chosen_maps_only_and_json_that_round_trips(tmp_path):
    model = classifier(hw.BudgetGate(keep=0.5))
    result = hw.explain(model, bert_inputs(), maps=[(1, 2)], pairs=0, effects=False)
    for _, site, _, head in heads_of(result):
        assert (head["attention"] is not None) == ((site, head["head"]) == (1, 2))
        assert head["pairs"] == [] and head["effect"] is None
    assert result.head(1, 2)["head"] == 2
    path = tmp_path / "explanation.json"
    result.save(path)
    document = json.loads(path.read_text())
    assert document == result.to_dict() == json.loads(result.to_json())
    assert (document["format"], document["version"]) == ("headwise.explanation", 1)


def test_refusals():
    model, inputs = classifier(hw.BudgetGate(keep=0.5)), bert_inputs()
    with pytest.raises(ValueError, match="maps must be 'all', 'none' or .* got 'some'"):
        hw.explain(model, inputs, maps="some")
    with pytest.raises(ValueError, match="maps name head 9 of site 0, which has 4"):
        hw.explain(model, inputs, maps=[(0, 9)])
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        hw.explain(model, inputs, batch_size=0)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        hw.explain(model, inputs, steps=0)
    with pytest.raises(ValueError, match="inputs that are texts need tokenizer="):
        hw.explain(model, "hello")
    with pytest.raises(ValueError, match="forward_fn called none"):
        hw.explain(model, inputs, forward_fn=lambda model, inputs: torch.zeros(3, 2))
    with pytest.raises(ValueError, match="labels must have one entry per class .3., got 2"):
        hw.explain(model, inputs, labels=["a", "b"])
    with pytest.raises(ValueError, match="has no attention module that headwise can convert"):
        hw.explain(nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_command_explains_texts(tiny_model, tmp_path, capsys):
    path = tmp_path / "explained.json"
    texts = ["a good film", "the <b>plot</b> is dull and so awful"]
    command = ["explain", "--model", str(tiny_model), "--text", *texts, "--json", str(path)]
    assert main([*command, "--maps", "0:1", "1:3", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "explanation.json").read_text() == path.read_text()
    printed = capsys.readouterr().out
    assert "8 of 8 heads ran." in printed and "a good film" in printed
    document = json.loads(path.read_text())
    first, second = document["inputs"]
    assert first["tokens"] == ["[CLS]", "a", "good", "film", "[SEP]"]
    assert [first["text"], second["text"]] == texts
    assert first["prediction"]["labels"] == ["LABEL_0", "LABEL_1"]
    assert len(first["layers"][0]["heads"][1]["attention"]) == 5
    assert first["layers"][0]["heads"][0]["attention"] is None
    assert first["layers"][1]["heads"][3]["effect"] is not None


def test_folders_that_are_not_whole(tiny_model, tmp_path, capsys):
    whole, roles = tmp_path / "whole", tmp_path / "roles.json"
    model = hw.convert(load_trained(tiny_model), hw.BudgetGate(keep=0.5))
    hw.save(model, whole)  # without tokenizer=
    roles.write_text("[1]")
    for more, sentence in (
        (["--model", str(whole)], f"the model folder {whole} has no tokenizer: save it there too "),
        (["--model", str(tmp_path)], f"the model folder {tmp_path} has no config.json"),
        (["--roles", str(roles)], "roles must be a document, got list"),
        (["--roles", str(tmp_path)], f"{tmp_path} is not JSON from 'headwise explain'"),
    ):
        assert main(["explain", "--model", str(tiny_model), "--text", "a", *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"headwise explain: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", " "], "headwise explain: --text must not be empty"),
        (["--text", "a", "--maps", "all", "0:1"], "headwise explain: --maps takes all, or none, "),
        (["--text", "a", "--maps", "9:9"], "headwise explain: maps name site 9, but the forward "),
        (["--text", "a", "--maps", "0:9"], "headwise explain: maps name head 9 of site 0, "),
        (["--text", "a", "--maps", "x"], "headwise explain: error: argument --maps: expected all"),
        (["--text", "a", "--json", "/nowhere/x.json"], "headwise explain: cannot write /nowhere/"),
        (["--text", "a", "--model", "nowhere"], "headwise explain: there is no model folder "),
        (["--text", "a", "--max-length", "2"], "headwise explain: max_length must leave room for "),
        (["--text", "a", "--limit", "9"], "headwise explain: --limit is for --data, not for "),
        (["--text", "a", "--grid", "2", "2"], "headwise explain: --grid is for --data, not for "),
    ],
)
def test_bad_use_is_one_sentence_and_status_2(tiny_model, capsys, arguments, sentence):
    assert main(["explain", "--model", str(tiny_model), *arguments]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(sentence)
