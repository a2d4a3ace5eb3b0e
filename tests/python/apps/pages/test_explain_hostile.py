"""Hostile texts, from the command line and from Python, up to the page."""

import csv
import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.pages.words import use_sentences
from headwise.apps.tasks.models import load_tokenizer, load_trained
from support.explain_documents import HOSTILE
from support.explained import trained

TEXTS = {
    "markup": HOSTILE,
    "emoji": "a good 😀 film 👩‍👩‍👧‍👦 ❤️",
    "right to left": "שלום עולם, فيلم جيد",
    "marks upon marks": "z̴͓͛a͜l̷g̸o " * 5,
    "ten thousand words": "good film " * 5000,
    "one long word": "x" * 20_000,
    "nothing to see": "\u200b\u2060",
    "control characters": "a\x00b\x1b[31mred\x07",
    "one letter": "a",
    "spaces and line ends": "  a \n\t good\r\n film\u00a0 ",
    "formula": "=HYPERLINK($A$1) $x^2$ % {{ 7 * 7 }}",
}


@pytest.fixture(scope="module")
def gated(tiny_model, tmp_path_factory):
    torch.manual_seed(0)
    model = trained(hw.convert(load_trained(tiny_model), hw.BudgetGate(keep=0.5)))
    folder = tmp_path_factory.mktemp("gated") / "model"
    hw.save(model, folder, tokenizer=load_tokenizer(tiny_model))
    return folder


def test_texts_given_by_hand(gated, tmp_path, capsys):
    command = ["explain", "--model", str(gated), "--text", *TEXTS.values(), "--out", str(tmp_path)]
    assert main([*command, "--format", "html", "png", "--max-length", "40"]) == 0
    document = json.loads((tmp_path / "explanation.json").read_text(encoding="utf-8"))
    entries = dict(zip(TEXTS, document["inputs"], strict=True))
    for name, entry in entries.items():
        assert entry["text"] == TEXTS[name]
        assert 2 <= len(entry["tokens"]) <= 40
        assert entry["tokens_cut"] == 0 or len(entry["tokens"]) == 40
        for layer in entry["layers"]:
            for head in layer["heads"]:
                total = head["constant"] + sum(head["shares"])
                assert total == pytest.approx(head["relevance"], abs=1e-5)
    assert entries["ten thousand words"]["tokens_cut"] == 10_000 + 2 - 40
    printed = capsys.readouterr().out
    assert "its last 9,962 tokens were left out, and all of this is about the first 40." in printed
    # Nothing that a terminal would take for an order.
    assert "a\\x00b\\x1b[31mred\\x07" in printed
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert max(map(len, printed.splitlines())) < 12_000
    content = (tmp_path / "explanation.html").read_text(encoding="utf-8")
    assert HOSTILE not in content and "<img src=x" not in content
    assert len(list(tmp_path.glob("input-*-heads.png"))) == len(TEXTS)


def test_a_data_set_of_them(gated, tmp_path, capsys):
    path = tmp_path / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([[text.replace("\x00", "")] for text in TEXTS.values()] * 2 + [[""]])
    command = [
        "explain",
        "--model",
        str(gated),
        "--data",
        str(path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--format", "html", "png", "--max-length", "30"]) == 0
    document = json.loads((tmp_path / "out" / "use.json").read_text(encoding="utf-8"))
    assert document["data"]["texts"] == 2 * len(TEXTS)  # the empty one is left out
    assert document["faithfulness"]["inputs"] == 2 * len(TEXTS)


def test_what_is_no_text_is_refused_in_one_sentence(gated, capsys):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    half = "a \ud83d film"
    assert main(["explain", "--model", str(gated), "--text", half]) == 2
    assert capsys.readouterr().err.strip() == (
        "headwise explain: --text must be text that UTF-8 can hold, got half a surrogate pair at "
        "character 2 of text 0"
    )
    for call, name in ((hw.explain, "inputs"), (hw.explain_data, "texts")):
        for texts, kind, sentence in (
            (
                ["a", half],
                ValueError,
                "must be texts that UTF-8 can hold, got half a surrogate pair",
            ),
            (["a", "  "], ValueError, "must not hold an empty text, got one at 1"),
            (["a", 3], TypeError, "must be strings, got int at 1"),
        ):
            with pytest.raises(kind, match=f"^{name} {sentence}"):
                call(model, texts, tokenizer=tokenizer)


def test_a_text_longer_than_the_model_takes_is_cut_and_that_is_told(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    result = hw.explain(model, ["good " * 10_000, "good"], tokenizer=tokenizer)
    assert [entry["tokens_cut"] for entry in result.inputs] == [10_002 - 64, 0]
    assert "its last 9,938 tokens were left out" in result.summary(0)
    assert "left out" not in result.summary(1)
    alone = hw.explain(model, dict(tokenizer("good", return_tensors="pt")))
    assert alone.inputs[0]["tokens_cut"] is None


def test_texts_that_the_tokenizer_does_not_know(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    foreign = "这部电影 很好 good"
    result = hw.explain(model, [foreign, "a good film"], tokenizer=tokenizer)
    unknown = result.inputs[0]["tokens"].count("[UNK]")
    assert [entry["tokens_unknown"] for entry in result.inputs] == [unknown, 0] and unknown >= 2
    assert f"{unknown} of its tokens are unknown to the tokenizer" in result.summary(0)
    assert "unknown" not in result.summary(1)
    options = {"permutations": 10, "resamples": 10}
    texts = [foreign, "a good film", "这部"]
    use = hw.explain_data(model, texts, tokenizer, **options)
    rows = [tokenizer(text)["input_ids"][1:-1] for text in texts]
    share = sum(row.count(tokenizer.unk_token_id) for row in rows) / sum(map(len, rows))
    assert use["data"]["tokens_unknown"] == pytest.approx(share, abs=1e-3)
    assert any("unknown to the tokenizer" in line for line in use_sentences(use))


def test_texts_of_which_nothing_is_left(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    use = hw.explain_data(model, ["\u200b"] * 3, tokenizer, permutations=10, resamples=10)
    assert use["data"]["tokens_unknown"] == 0.0 and use["data"]["tokens_mean"] == 2.0
    for call, texts in ((hw.explain, "a good film"), (hw.explain_data, ["a good film", "a film"])):
        with pytest.raises(ValueError, match=r"max_length must leave room .* beside 2 .* got 2"):
            call(model, texts, tokenizer=tokenizer, max_length=2)


def test_a_data_set_of_texts_longer_than_the_model_takes(gated):
    model, tokenizer = load_trained(gated), load_tokenizer(gated)
    texts = ["good film " * 100, "a good film"]
    use = hw.explain_data(model, texts, tokenizer, max_length=5000, permutations=10, resamples=10)
    assert use["settings"]["max_length"] == 64 and use["data"]["tokens_mean"] == (64 + 5) / 2
