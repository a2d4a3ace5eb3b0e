"""headwise.explain_data and `headwise explain --data`: a tiny gated classifier from end to end."""

import json
import random
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.cli import main
from headwise.compare.models import load_tokenizer, load_trained
from headwise.explain.data_set import role_use
from headwise.explain.noise import NOISES
from headwise.explain.use import Use, describe_use
from test_explain import trained

OPS = torch.ops.headwise


@pytest.fixture(scope="module")
def gated(tiny_model, tmp_path_factory):
    """The folder of a gated classifier whose classes are up and down."""
    torch.manual_seed(0)
    model = trained(hw.convert(load_trained(tiny_model), hw.BudgetGate(target=0.5)))
    model.config.id2label, model.config.label2id = {0: "down", 1: "up"}, {"down": 0, "up": 1}
    folder = tmp_path_factory.mktemp("gated") / "model"
    hw.save(model, folder, tokenizer=load_tokenizer(tiny_model))
    return folder


@pytest.fixture(scope="module")
def command(gated, tiny_texts):
    return [
        "explain", "--model", str(gated), "--data", str(tiny_texts),
        "--text-column", "review", "--label-column", "mood", "--limit", "60", "--threads", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def document(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("use") / "use.json"
    assert main([*command, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_document_says_what_the_model_did(document, gated, tiny_texts):
    assert (document["format"], document["version"]) == ("headwise.use", 1)
    assert document["data"]["texts"] == 60 and document["data"]["classes"] == ["down", "up"]
    assert sum(document["data"]["predicted"]) == 60
    assert document["roles"]["format"] == "headwise.roles"
    use = document["use"]
    assert use["heads"] == 8 and 0 < use["heads_mean"] < 8
    assert sum(group["inputs"] for group in use["by_length"]) == 60
    rates = [head["frequency"] for layer in use["layers"] for head in layer["heads"]]
    assert sum(rates) == pytest.approx(use["heads_mean"], abs=0.01)
    assert use["always"] == sum(rate == 1 for rate in rates)
    for layer in use["layers"]:
        for head in layer["heads"]:
            varies = 0 < head["frequency"] < 1
            for key in ("information", "length", "entropy", "confidence"):
                assert (head[key] is not None) == varies
    names = [row["name"] for row in document["stability"]]
    assert names == list(NOISES)
    for row in document["stability"]:
        assert 0 <= row["low"] <= row["jaccard"] <= row["high"] <= 1
    # The tiny tokenizer lowers its input: capitals are the same text to the model.
    assert document["stability"][1]["jaccard"] == 1.0
    faith = document["faithfulness"]
    assert faith["inputs"] == 60 and faith["removed"][0] == 0 and faith["removed"][-1] == 1
    assert faith["stated"][0] == pytest.approx(faith["random"][0], abs=1e-4)
    assert faith["stated"][-1] == pytest.approx(faith["random"][-1], abs=1e-4)


def test_use_is_counted_from_the_selections(gated, tiny_texts):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    texts = ["a good film", "the plot is dull", "it is a very good and fine film", "so poor"]
    result = hw.explain_data(model, texts, tokenizer, permutations=20, resamples=20, batch_size=3)
    rows = []
    for text in texts:
        with hw.trace(model) as t, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        rows.append(torch.cat([
            OPS.selection_mask(s.index, s.count, torch.float32) for s in t.selections.values()
        ], 1))  # fmt: skip
    expected = torch.cat(rows).mean(0).tolist()
    found = [head["frequency"] for layer in result["use"]["layers"] for head in layer["heads"]]
    assert found == pytest.approx(expected, abs=1e-4)
    assert result["data"]["accuracy"] is None


def test_an_interrupted_run_goes_on(command, document, tmp_path, monkeypatch, capsys):
    calls = []
    original = hw.MultiheadAttention.forward

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(hw.MultiheadAttention, "forward", stopping)
    assert main([*command, "--out", str(out), "--batch-size", "32"]) == 1
    error = capsys.readouterr().err
    assert f"finished parts are kept in {out}" in error
    assert len(list((out / "parts").rglob("*.safetensors"))) >= 2
    before = len(calls)
    assert main([*command, "--out", str(out), "--batch-size", "32"]) == 0
    first = len(calls) - before
    assert json.loads((out / "use.json").read_text()) == document
    assert main([*command, "--out", str(out), "--batch-size", "32"]) == 0
    assert len(calls) - before - first < first  # parts that are whole are not computed again


def test_models_of_other_seeds_and_ungated_models(tiny_model, gated, tiny_texts):
    texts = ["a good film", "the plot is dull", "it is a very good and fine film", "so poor"] * 3
    model, tokenizer = load_trained(tiny_model), load_tokenizer(tiny_model)
    result = hw.explain_data(
        model, texts, tokenizer, others={"gated": load_trained(gated)}, permutations=20,
        resamples=20,
    )  # fmt: skip
    assert result["use"]["heads_mean"] == 8 and result["use"]["always"] == 8
    assert result["faithfulness"] is None
    assert result["stability"][-1]["name"] == "gated"
    assert 0 < result["stability"][-1]["jaccard"] < 1
    random_gates = hw.convert(load_trained(tiny_model), hw.RandomGate(keep=0.5))
    result = hw.explain_data(random_gates, texts, tokenizer, permutations=20, resamples=20)
    assert result["stability"][-1]["kind"] == "seed"


def test_syntax_from_a_file(command, tmp_path):
    from test_roles import CONLLU

    parsed = tmp_path / "parsed.conllu"
    parsed.write_text(CONLLU.split("\n\n")[0].replace("films", "film") + "\n\n" + "\n".join(
        [CONLLU.split("\n\n")[0], ""] * 30
    ))  # fmt: skip
    path = tmp_path / "use.json"
    assert main([*command, "--conllu", str(parsed), "--json", str(path)]) == 0
    roles = json.loads(path.read_text())["roles"]
    details = {q["detail"] for q in roles["questions"] if q["role"] == "syntactic"}
    assert {"det: dependent to head", "nsubj: head to dependent"} <= details
    # The roles that were found can be told with a text.
    folder = Path(command[2])
    model = load_trained(folder)
    result = hw.explain(model, "a good film", tokenizer=load_tokenizer(folder), roles=roles)
    assert all(head["roles"] is not None for layer in result.inputs[0]["layers"]
               for head in layer["heads"])  # fmt: skip
    with pytest.raises(ValueError, match="roles must be a document of format 'headwise.roles'"):
        hw.explain(model, "a good film", tokenizer=load_tokenizer(folder), roles={})


def test_statistics_of_planted_use():
    """Head 0 for one class, head 1 for long inputs, heads 2 and 3 in place of each other."""
    generator = torch.Generator().manual_seed(0)
    inputs = 200
    length = torch.randint(5, 50, (inputs,), generator=generator)
    logits = torch.randn(inputs, 2, generator=generator)
    coin = torch.rand(inputs, generator=generator) < 0.5
    chosen = torch.stack(
        [logits.argmax(1) == 1, length > 25, coin, ~coin, torch.ones(inputs).bool()], 1
    )
    use = Use([("layer", 0, 5)], chosen, logits, length, torch.rand(inputs).double())
    described = describe_use(use, ["a", "b"], permutations=300)
    heads = described["layers"][0]["heads"]
    assert heads[0]["by_class"] == [0.0, 1.0] and heads[0]["information"]["bits"] > 0.9
    assert heads[0]["information"]["q"] < 0.05 < heads[2]["information"]["q"]
    assert heads[1]["length"]["correlation"] == 1.0 and heads[1]["length"]["q"] < 0.05
    assert heads[4]["length"] is None
    assert described["stand_in"] == [{"site": 0, "heads": [2, 3], "phi_min": -1.0}]
    assert described["together"][0] == {"first": [0, 2], "second": [0, 3], "phi": -1.0}
    assert described["by_length"][0]["heads_mean"] < described["by_length"][-1]["heads_mean"]
    roles = {
        "layers": [
            {"heads": [{"roles": [{"role": kind}] if kind else []} for kind in
                       ("x", "x", "", "", "")]}
        ]
    }  # fmt: skip
    rows = role_use(roles, described, 100, 0)
    row = next(r for r in rows if r["role"] == "x" and r["property"] == "frequency")
    assert (row["heads"], row["others"]) == (2, 3)
    assert all(r["p"] <= r["q"] <= 1 for r in rows)


def test_noise_changes_texts_a_little():
    text = "the quick brown foxes jumped over several lazy dogs yesterday " * 20
    for name, noise in NOISES.items():
        changed = noise(text, random.Random(0))
        assert changed != text.strip() and noise(text, random.Random(0)) == changed
        share = len(changed.split()) / len(text.split())
        assert 0.8 < share <= 1.0, name
        if name == "capitals":
            assert changed.lower() == text.strip()
        if name == "misspelling":
            pairs = list(zip(text.split(), changed.split(), strict=True))
            assert all(sorted(a) == sorted(b) for a, b in pairs)
            assert 0.02 < sum(a != b for a, b in pairs) / len(pairs) < 0.2
        assert noise("word", random.Random(1)).lower()[0] == "w"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "no.csv"], "headwise explain: there is no file no.csv"),
        (
            ["--data", "no.txt"],
            "headwise explain: data must be a .csv or .jsonl file, got 'no.txt'",
        ),
        (["--text-column", "words"], "headwise explain: {data} has no column 'words'; it has "),
        (["--label-column", "film"], "headwise explain: {data} has the label 'film "),
        (["--conllu", "no.conllu"], "headwise explain: there is no file no.conllu"),
        (
            ["--threshold", "offset=2"],
            "headwise explain: --threshold: offset must be between 0 and",
        ),
        (["--threshold", "magic=1"], "headwise explain: --threshold must name one of offset, "),
        (["--spacy", "no_such_pipeline"], "headwise explain: spaCy and its pipeline "),
    ],
)
def test_bad_use_is_one_sentence_and_status_2(command, tiny_texts, capsys, arguments, sentence):
    assert main([*command, *arguments]) == 2
    expected = sentence.format(data=tiny_texts)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(expected)
