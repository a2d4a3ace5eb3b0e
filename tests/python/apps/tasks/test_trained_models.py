"""What ``score``, ``prune`` and ``explain`` take for a trained text classifier."""

from __future__ import annotations

import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.models import load_classifier, load_trained, model_folder
from safetensors.torch import load_file, save_file
from support.architectures import decoder_config
from support.compare_fixtures import write_model


def without(folder, *ends: str):
    """The model folder, without the weights whose names end so."""
    path = folder / "model.safetensors"
    state = load_file(path)
    kept = {name: value for name, value in state.items() if not name.endswith(ends)}
    assert len(kept) == len(state) - len(ends)
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def write_decoder(folder, head: bool):
    """A tiny Llama with the tokenizer of the tiny BERT, with its classification head or without."""
    from transformers import LlamaForSequenceClassification, LlamaModel

    write_model(folder)
    config = decoder_config(vocab_size=23)
    torch.manual_seed(0)
    (LlamaForSequenceClassification if head else LlamaModel)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["score", "explain"])
def test_a_decoder_without_its_head_is_refused(tmp_path, tiny_texts, capsys, command):
    """Its head is called score, not classifier: what is missing is what from_pretrained reports."""
    folder = write_decoder(tmp_path / "model", head=False)
    texts = {
        "score": ["--data", tiny_texts, "--text", "review", "--label", "mood"],
        "explain": ["--text", "the film is good"],
    }[command]
    assert main([command, "--model", str(folder), *map(str, texts)]) == 2
    assert (
        f"headwise {command}: the model in {folder} has no trained classification head: its "
        "weights lack 'score.weight'"
    ) in capsys.readouterr().err
    trained = load_trained(write_decoder(tmp_path / "trained", head=True))
    assert len(hw.attention_layers(trained)) == 2


@pytest.mark.parametrize("name", ["classifier.bias", "pooler.dense.weight", "LayerNorm.bias"])
def test_any_weight_that_is_missing_is_told(tmp_path, name):
    folder = write_model(tmp_path / "model", layers=1)
    if name == "LayerNorm.bias":
        name = "encoder.layer.0.output.LayerNorm.bias"
    without(folder, name)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        load_trained(folder)
    if "classifier" in name or "pooler" in name:  # a pretrained encoder may lack both
        load_classifier(folder, 2)
    else:
        with pytest.raises(UsageError, match="lacks 1 weights of BertForSequenceClassification"):
            load_classifier(folder, 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classif"),
        ({"problem_type": "regression"}, "problem_type='regression' with num_labels=2"),
    ],
)
def test_several_labels_a_text_are_refused(tmp_path, tiny_texts, capsys, changes, complaint):
    folder = configured(write_model(tmp_path / "model"), **changes)
    texts = ["--data", tiny_texts, "--text", "review", "--label", "mood"]
    for command in (["score", *texts], ["explain", "--text", "good"]):
        assert main([*map(str, command), "--model", str(folder)]) == 2
        message = capsys.readouterr().err
        assert "must give each text one class" in message and complaint in message


def test_explanations_of_several_labels_a_text_claim_no_prediction(tmp_path, tiny_model):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, problem_type="multi_label_classification"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    entry = hw.explain(model, "the film is good", tokenizer=tokenizer).document["inputs"][0]
    assert entry["prediction"] is None
    assert all(h["effect"] is None for layer in entry["layers"] for h in layer["heads"])
    with pytest.raises(ValueError, match="model must give each text one class"):
        hw.explain(model, "the film is good", tokenizer=tokenizer, effects=True)
    with pytest.raises(ValueError, match="model must give each text one class"):
        hw.explain_data(model, ["good", "bad"], tokenizer)


def test_a_model_that_is_no_classifier_is_refused(tmp_path, tiny_model):
    from transformers import AutoTokenizer, BertModel

    model = hw.convert(BertModel.from_pretrained(tiny_model))
    hw.save(model, tmp_path / "base", tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    with pytest.raises(UsageError, match="is a BertModel: a text classifier is needed"):
        load_trained(tmp_path / "base")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "owner/kernel@main:function"},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
        {"attn_implementation": {"text_config": "owner/kernel"}},
    ],
)
def test_no_kernel_is_fetched(tmp_path, changes, monkeypatch, capsys):
    folder = configured(write_model(tmp_path / "model"), **changes)
    monkeypatch.setattr(
        "transformers.AutoModelForSequenceClassification.from_pretrained",
        lambda *arguments, **options: pytest.fail("the model was loaded"),
    )
    assert main(["explain", "--model", str(folder), "--text", "good"]) == 2
    assert "code of a hub's repository, which is never fetched" in capsys.readouterr().err
    with pytest.raises(UsageError, match="never fetched"):
        model_folder(folder)


def test_a_text_that_begins_with_a_dash(tiny_model, capsys):
    arguments = ["explain", "--model", str(tiny_model), "--no-effects"]
    assert main([*arguments, "--text=-awful", "--text", "good", "fine"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "-awful" and {"good", "fine"} <= set(printed)
