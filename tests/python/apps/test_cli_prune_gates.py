"""``headwise prune`` of a model with gates: every refusal names a way that works."""

from __future__ import annotations

import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.pruning import LayerPlan
from support.compare_fixtures import write_model


@pytest.fixture
def gated(tmp_path, request):
    """A tiny BERT with gates, its folder, and options that name texts it knows."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_model(tmp_path / "pretrained")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label={0: "down", 1: "up"}, label2id={"down": 0, "up": 1}
    )
    model = hw.convert(model, hw.HardConcreteGate(input_dependent=request.param)).eval()
    torch.manual_seed(1)
    for layer in hw.attention_layers(model).values():
        gate = layer.gate
        torch.nn.init.normal_(gate.relevance.weight if request.param else gate.log_alpha, std=2.0)
    hw.save(model, tmp_path / "gated", tokenizer=AutoTokenizer.from_pretrained(folder))
    return model, tmp_path / "gated"


def prune(folder, capsys, *options):
    arguments = ["prune", "--model", folder, "--out", folder.parent / "small", *options]
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.err.strip() if status else captured.out.strip()


@pytest.mark.parametrize("gated", [True], indirect=True)
def test_gates_that_choose_for_every_input(gated, tiny_texts, capsys, tmp_path):
    model, folder = gated
    data = ["--data", tiny_texts, "--text", "review", "--label", "mood", "--limit", "32"]
    way_out = (
        f"headwise prune: the model in {folder} has gates that choose for every input, so no plan "
        "does what it does: --keep SHARE --data FILE --metric use keeps the heads that they run "
        "most often"
    )
    names = list(hw.attention_layers(model))
    hw.HeadPlan([LayerPlan(names[0], 4, [0])], "mine").save(tmp_path / "plan.json")
    for refused in (
        ["--keep", "0.5", *data],
        ["--gates"],
        ["--plan", tmp_path / "plan.json"],
        ["--keep", "0.5", "--method", "kwon", *data],
    ):
        assert prune(folder, capsys, *refused) == (2, way_out)
    status, said = prune(folder, capsys, "--keep", "0.5", "--metric", "use", *data)
    assert status == 0 and said.startswith("heads 8 -> 4, ")
    small = hw.load(folder.parent / "small")
    assert all(layer.gate is None for layer in hw.attention_layers(small).values())
    # The plan that was written can be given in its turn.
    plan = folder.parent / "small" / "plan.json"
    assert json.loads(plan.read_text())["metric"] == "use"
    kept = plan.rename(tmp_path / "use.json")
    assert prune(folder, capsys, "--plan", kept)[0] == 0


@pytest.mark.parametrize("gated", [False], indirect=True)
def test_gates_that_choose_the_same_for_every_input(gated, tiny_texts, capsys):
    model, folder = gated
    data = ["--data", tiny_texts, "--text", "review", "--label", "mood", "--limit", "32"]
    assert prune(folder, capsys, "--keep", "0.5", *data) == (
        2,
        f"headwise prune: the model in {folder} has gates that choose the same heads for every "
        "input: make it smaller by them first (headwise prune --gates)",
    )
    assert (
        "needs a model with gates that choose for every input"
        in (prune(folder, capsys, "--keep", "0.5", "--metric", "use", *data)[1])
    )
    status, said = prune(folder, capsys, "--gates")
    kept = hw.plan_from_gates(model).heads_kept
    assert status == 0 and said.startswith(f"heads 8 -> {kept}, ") and kept < 8
    arguments = ["prune", "--model", folder.parent / "small", "--out", folder.parent / "smaller"]
    assert main([*map(str, arguments), "--keep", "0.5", *map(str, data)]) == 0
