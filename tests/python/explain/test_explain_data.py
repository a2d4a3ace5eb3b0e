"""headwise.explain_data and `headwise explain --data`: a tiny gated classifier from end to end."""

import json
import random
import shutil
import sys
import types
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.tasks.models import load_tokenizer, load_trained
from headwise.explain import (
    AlignedPair,
    Sentence,
    annotate_texts,
    parse_with_spacy,
    read_alignments,
)
from headwise.explain.faithfulness import measure_faithfulness
from headwise.explain.noise import NOISES
from headwise.explain.role_use import role_use
from headwise.explain.substitutes import joint_ablation
from headwise.explain.use import Use, describe_use
from support.explain_documents import CONLLU
from support.explained import trained

OPS = torch.ops.headwise


@pytest.fixture(scope="module")
def gated(tiny_model, tmp_path_factory):
    """The folder of a gated classifier whose classes are up and down."""
    torch.manual_seed(0)
    model = trained(hw.convert(load_trained(tiny_model), hw.BudgetGate(keep=0.5)))
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
    (kept,) = (out / "parts").iterdir()
    assert len(kept.read_text().splitlines()) >= 3
    before = len(calls)
    assert main([*command, "--out", str(out), "--batch-size", "32"]) == 0
    first = len(calls) - before
    assert json.loads((out / "use.json").read_text()) == document
    assert '["curves/' in kept.read_text()
    assert main([*command, "--out", str(out), "--batch-size", "32"]) == 0
    # Complete parts are not computed again: one forward per stage finds the layers.
    assert len(calls) - before - first < 15 < first


def test_texts_in_which_noise_changes_no_token_are_not_run_again(gated, monkeypatch):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    texts = ["a good film", "the plot is dull", "it is a very good and fine film", "so poor"] * 4
    monkeypatch.setitem(NOISES, "word drop-out", lambda text, generator: "film" if "so" in text
                        else text)  # fmt: skip
    found = hw.explain_data(model, texts, tokenizer, permutations=10, resamples=10)
    rows = {row["name"]: row for row in found["stability"]}
    assert rows["capitals"]["texts_changed"] > 0 and rows["capitals"]["jaccard"] == 1.0
    changed = [NOISES["word drop-out"](text, None) for text in texts]
    masks = []
    for own in (texts, changed):
        run = hw.explain(model, own, tokenizer=tokenizer, effects=False).inputs
        masks.append(
            torch.tensor([[h["on"] for s in e["layers"] for h in s["heads"]] for e in run])
        )
    overlap = OPS.selection_overlap(*masks).mean().item()
    assert rows["word drop-out"]["jaccard"] == pytest.approx(overlap, abs=1e-3)


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

    parsed = tmp_path / "parsed.conllu"
    parsed.write_text(CONLLU.split("\n\n")[0].replace("films", "film") + "\n\n" + "\n".join(
        [CONLLU.split("\n\n")[0], ""] * 30
    ))  # fmt: skip
    path = tmp_path / "use.json"
    assert main([*command, "--conllu", str(parsed), "--json", str(path)]) == 0
    roles = json.loads(path.read_text())["roles"]
    details = {q["detail"] for q in roles["questions"] if q["role"] == "syntactic"}
    assert {"det: dependent to head", "nsubj: head to dependent"} <= details
    # The roles that were found can be shown with a text.
    folder = Path(command[2])
    model = load_trained(folder)
    result = hw.explain(model, "a good film", tokenizer=load_tokenizer(folder), roles=roles)
    assert all(head["roles"] is not None for layer in result.inputs[0]["layers"]
               for head in layer["heads"])  # fmt: skip
    with pytest.raises(ValueError, match="roles must be a document of format 'headwise.roles'"):
        hw.explain(model, "a good film", tokenizer=load_tokenizer(folder), roles={})


def test_the_curves_of_faithfulness_are_those_of_removed_heads(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    inputs = tokenizer(["a good film", "the plot is dull"], padding=True, return_tensors="pt")
    forward = lambda model, inputs: model(**inputs).logits  # noqa: E731
    with torch.no_grad():
        found = measure_faithfulness(model.eval(), [inputs], forward, points=4, resamples=10)
        explained = hw.explain(model, dict(inputs), effects=False).inputs
        before = forward(model, inputs).log_softmax(1)
        expected = []
        for b, entry in enumerate(explained):
            heads = [(s["site"], h) for s in entry["layers"] for h in s["heads"] if h["on"]]
            # Where a layer lets no head sleep there is no cut: from its least relevant head.
            lowest = [min(h["relevance"] for h in s["heads"]) for s in entry["layers"]]
            heads.sort(key=lambda one: one[1]["margin"] if one[1]["margin"] is not None
                       else one[1]["relevance"] - lowest[one[0]])  # fmt: skip
            row = [before[b].max().item()]
            for point in range(1, 5):
                gone = {(s, h["head"]) for s, h in heads[: (len(heads) * point + 2) // 4]}
                held = hw.convert(load_trained(gated))
                for site, layer in enumerate(hw.attention_layers(held).values()):
                    layer.set_gate(hw.FixedGate(scale=[
                        0.0 if (site, h["head"]) in gone else h["weight"]
                        for h in entry["layers"][site]["heads"]
                    ]))  # fmt: skip
                one = {name: value[b : b + 1] for name, value in inputs.items()}
                after = forward(held, one).log_softmax(1)
                row.append(after[0, before[b].argmax()].item())
            expected.append(row)
    assert found["removed"] == [0, 0.25, 0.5, 0.75, 1.0]
    assert found["stated"] == pytest.approx(torch.tensor(expected).mean(0).tolist(), abs=1e-3)
    assert found["random"][0] == pytest.approx(found["stated"][0], abs=1e-4)
    assert found["random"][-1] == pytest.approx(found["stated"][-1], abs=1e-4)
    assert found["inputs"] == 2 and found["low"] <= found["area"] <= found["high"]


def test_alignments_from_a_file(command, tmp_path):
    lines = ["a good film ||| film a good ||| 0-1 1-2 2-0", "", "the plot ||| the plot ||| 0-0 1-1"]
    path, use = tmp_path / "pairs.txt", tmp_path / "use.json"
    path.write_text("\n".join(lines * 15), encoding="utf-8")
    assert main([*command, "--alignments", str(path), "--json", str(use)]) == 0
    roles = json.loads(use.read_text())["roles"]
    trials = {q["detail"]: q["trials"] for q in roles["questions"] if q["role"] == "alignment"}
    assert set(trials) == {"1 to 2", "2 to 1"} and trials["1 to 2"] == trials["2 to 1"] > 30
    pairs = read_alignments(path)
    assert pairs[0] == AlignedPair(
        ("a", "good", "film"), ("film", "a", "good"), ((0, 1), (1, 2), (2, 0))
    )
    assert len(pairs) == 30 and len(read_alignments(path, limit=4)) == 4


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a b", "line 1 of {path} must have the form 'words ||| words ||| 0-0 1-1'"),
        ("a ||| b ||| 0", "line 1 of {path} has the alignment '0', not 0-0"),
        ("a ||| b ||| 0-0\na ||| b ||| 0-1", "line 2 of {path} aligns 0-1, but has 1 and 1 words"),
        ("\n", "{path} has no aligned pair"),
        (
            "a ||| b |||\nc ||| d |||",
            "{path} aligns no words: every line ends after the second |||",
        ),
    ],
)
def test_alignments_that_cannot_be_read(content, sentence, tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(content)
    with pytest.raises(ValueError) as failed:
        read_alignments(path)
    assert str(failed.value) == sentence.format(path=path)


def test_one_aligned_pair_is_not_enough_for_two_halves(command, tmp_path, capsys):
    path = tmp_path / "pairs.txt"
    path.write_text("a good film ||| film a good ||| 0-1 1-2 2-0\n")
    assert main([*command, "--alignments", str(path)]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("alignments must be at least two, one for each half, got 1")
    )


def test_aligned_pairs_become_batches(gated):
    tokenizer = load_tokenizer(gated)
    pair = AlignedPair(("a", "xfilmx", "good"), ("good", "film"), ((2, 0), (0, 1)))
    (batch,) = annotate_texts([pair], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(batch.ids[0].tolist())
    places = [place for place, token in enumerate(tokens) if token == "[SEP]"]
    assert batch.side[0].tolist() == [0] + [1] * (places[0] - 1) + [0, 2, 2, 0]
    (first, second) = batch.alignment[0]
    assert tokens[first[0]] == "good" == tokens[first[1]] and first[1] > places[0]
    assert (tokens[second[0]], tokens[second[1]]) == ("a", "film")
    assert batch.words[0, places[0] + 1] == 3  # words of the second text count on
    if "token_type_ids" in batch.inputs:
        assert batch.inputs["token_type_ids"][0].tolist() == [int(s == 2) for s in batch.side[0]]
    (mixed,) = annotate_texts([pair, "a film"], tokenizer)
    assert mixed.alignment[0] == [] and mixed.side[0].sum() == 0 and mixed.alignment[1]


def test_texts_that_are_images(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    texts = ["a good film the plot is"] * 8
    result = hw.explain_data(
        model, texts, tokenizer, grid=(2, 3), permutations=10, resamples=10, faithfulness_texts=2
    )
    details = {q["detail"] for q in result["roles"]["questions"] if q["role"] == "grid offset"}
    assert {"+0,+1", "-1,+0", "+1,+1"} <= details
    with pytest.raises(ValueError, match="grid must have one place per content tok"):
        hw.explain_data(model, texts, tokenizer, grid=(2, 2))


def test_heads_that_stand_in_for_each_other_by_joint_ablation(gated, tmp_path):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    texts = ["a good film", "the plot is dull", "it is a very good and fine film", "so poor"]
    options = {"permutations": 10, "resamples": 10, "joint_ablation": 5, "folder": tmp_path}
    result = hw.explain_data(model, texts, tokenizer, **options)
    joint = result["joint_ablation"]
    assert joint["inputs"] == 4 and len(joint["pairs"]) == 5
    names = list(hw.attention_layers(model))
    assert joint["layers"] == names
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        classes = model(**batch).logits.argmax(1)
    known = hw.analysis.head_interactions(
        model, [batch],
        lambda m, b: torch.nn.functional.cross_entropy(m(**b).logits, classes, reduction="none"),
        [tuple((names[s], h) for s, h in (row["first"], row["second"])) for row in joint["pairs"]],
    )  # fmt: skip
    for row, effect in zip(joint["pairs"], known.effect.tolist(), strict=True):
        assert row["first"][0] == row["second"][0]
        assert row["effect"] == pytest.approx(effect, abs=1e-5)
    assert len(list(tmp_path.glob("joint-ablation-*.jsonl"))) == 1
    assert hw.explain_data(model, texts, tokenizer, **options)["joint_ablation"] == joint


def test_planted_substitutes_are_found():
    """y = relu(x_0 + x_1), where x_0 = x_1: either head gives the sign away. Head 2 adds."""

    class Either(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = hw.MultiheadAttention(4, 4, bias=False, batch_first=True)
            with torch.no_grad():
                self.mha.in_proj_weight.zero_()
                self.mha.in_proj_weight[8:].copy_(torch.eye(4))
                self.mha.out_proj.weight.copy_(torch.eye(4))

        def forward(self, x):
            y = self.mha(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
            value = torch.maximum(y[:, 0], y[:, 1]) + 0.5 * y[:, 2]
            return torch.stack([value, -value], 1)

    torch.manual_seed(0)
    x = torch.rand(200, 4) + 0.5
    x[:, 1] = x[:, 0]
    with torch.no_grad():
        found = joint_ablation(Either(), [x], lambda m, b: m(b), pairs=6)
    assert found["groups"] == [{"site": 0, "heads": [0, 1]}]
    best = found["pairs"][0]
    assert (best["first"], best["second"]) == ([0, 0], [0, 1]) and best["similarity"] == 1.0
    assert best["alone"] == [0, 0] and best["effect"] > 0.05 and best["q"] < 1e-6


class Word:
    """A token of spaCy, as far as it is read."""

    def __init__(self, place, text, head, relation):
        self.i, self.text, self.dep_, self._head = place, text, relation, head
        self.is_space = text.isspace()

    @property
    def head(self):
        return self._head()


def fake_spacy(known):
    """A module that parses 'a good film' and knows one pipeline."""

    def load(name):
        if name != known:
            raise OSError(f"[E050] Can't find model '{name}'")
        return types.SimpleNamespace(pipe=lambda texts: map(parse, texts))

    def parse(text):
        words = []
        for place, part in enumerate(text.split(" ")):
            last = len(text.split(" ")) - 1
            head = (lambda: words[-1]) if place < last else (lambda place=place: words[place])
            words.append(Word(place, part, head, "det" if place == 0 else "ROOT"))
        return types.SimpleNamespace(sents=[words])

    return types.SimpleNamespace(load=load)


def test_syntax_from_spacy_where_it_is_installed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spacy", fake_spacy("known"))
    sentences = parse_with_spacy(["a film", "word"], "known")
    assert sentences == [Sentence(("a", "film"), ((0, 1, "det"),))]
    path = tmp_path / "use.json"
    assert main([*command, "--spacy", "known", "--json", str(path)]) == 0
    roles = json.loads(path.read_text())["roles"]
    assert any(q["detail"] == "det: dependent to head" for q in roles["questions"])
    capsys.readouterr()
    assert main([*command, "--spacy", "unknown"]) == 2
    sentence = "headwise explain: spaCy and its pipeline 'unknown' must be installed to parse"
    assert capsys.readouterr().err.strip().splitlines()[-1] == sentence
    monkeypatch.setitem(sys.modules, "spacy", None)  # as where it is not installed
    assert main([*command, "--spacy", "known"]) == 2
    sentence = "headwise explain: spaCy and its pipeline 'known' must be installed to parse"
    assert capsys.readouterr().err.strip().splitlines()[-1] == sentence


def test_spacy_itself(gated):
    spacy = pytest.importorskip("spacy")
    names = spacy.util.get_installed_models()
    if not names:
        pytest.skip("no pipeline of spaCy is installed")
    (sentence,) = parse_with_spacy(["The old man saw a dog."], names[0])
    assert sentence.words == ("The", "old", "man", "saw", "a", "dog", ".")
    assert (0, 2, "det") in sentence.dependencies


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
    assert described["substitutes"] == [{"site": 0, "heads": [2, 3], "phi_min": -1.0}]
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


def test_texts_of_one_class_and_models_of_one_name(gated, tiny_model, tmp_path, capsys):
    path, use = tmp_path / "texts.csv", tmp_path / "use.json"
    rows = ["a good film,1", "the film is fine,1", "a very good plot,1"]  # class 1, by number
    path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    others = []
    for name in ("one", "two"):
        others.append(tmp_path / name / "model")
        shutil.copytree(gated, others[-1])
    command = ["explain", "--model", str(gated), "--data", str(path), "--json", str(use)]
    assert main([*command, "--others", *map(str, others)]) == 0
    document = json.loads(use.read_text())
    predicted = document["data"]["predicted"]
    assert document["data"]["accuracy"] == pytest.approx(predicted[1] / 3, abs=1e-3)
    rows = [row for row in document["stability"] if row["kind"] == "model"]
    assert [row["name"] for row in rows] == list(map(str, others))
    assert all(row["jaccard"] == 1.0 for row in rows)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "no.csv"], "headwise explain: there is no file no.csv"),
        (
            ["--data", "no.txt"],
            "headwise explain: data must be a .csv or .jsonl file, got 'no.txt'",
        ),
        (["--text-column", "words"], "headwise explain: {data} has no column 'words'; it has "),
        (["--label-column", "film"], "headwise explain: label 'film "),
        (["--label-column", "moods"], "headwise explain: {data} has no column 'moods'; it has "),
        (["--max-length", "2"], "headwise explain: max_length must leave room for tokens of the "),
        (["--roles", "no.json"], "headwise explain: --roles is for --text, not for --data"),
        (["--no-effects"], "headwise explain: --no-effects is for --text, not for --data"),
        (
            ["--threshold", "least-trials=2.5"],
            "headwise explain: --threshold: least_trials must be a whole number, got 2.5",
        ),
        (["--conllu", "no.conllu"], "headwise explain: there is no file no.conllu"),
        (
            ["--threshold", "offset=2"],
            "headwise explain: --threshold: offset must be between 0 and",
        ),
        (["--threshold", "magic=1"], "headwise explain: --threshold must name one of offset, "),
        (["--alignments", "no.txt"], "headwise explain: there is no file no.txt"),
        (["--grid", "2", "2"], "headwise explain: grid must have one place per "),
        (["--spacy", "no_such_pipeline"], "headwise explain: spaCy and its pipeline "),
    ],
)
def test_bad_use_is_one_sentence_and_status_2(command, tiny_texts, capsys, arguments, sentence):
    assert main([*command, *arguments]) == 2
    expected = sentence.format(data=tiny_texts)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(expected)
