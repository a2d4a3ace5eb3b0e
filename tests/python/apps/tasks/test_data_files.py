"""Data files are read strictly: what could mean two things is refused, with the line."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from headwise.apps.cli import explain_data, main
from headwise.apps.tasks.errors import LONGEST, UsageError
from headwise.apps.tasks.tasks import class_numbers, task_from_file
from headwise.io.printable import printable, quoted
from hypothesis import given, settings
from hypothesis import strategies as st

CSV = [
    ('text,label\na,up\n"b,down\nc,up\n', r"line 3 of .*: a quote that is opened there is never"),
    ('text,label\na,up\n"b"c,down\n', r"line 3 of .* is not CSV: ',' expected after '\"'"),
    ("text,label,label\na,up,down\n", "line 1 of .* has the column 'label' 2 times"),
    ("text,label\na,up\nb,down,and more\n", "line 3 of .* has 3 cells, but the header has 2"),
    ("text,label\n\na,up\n\nb\n", "line 5 of .* has 1 cells, but the header has 2"),
    ("text,label\na,up\nb, \n", "line 3 of a.csv has no value for 'label'"),
    ("text,label\n", "has no rows"),
    ("text,labels\na,up\n", "has no column 'label'; it has 'text', 'labels'"),
]
JSON_LINES = [
    ('{"text": "a", "label": NaN}', "line 2 of .* has NaN, which JSON does not have"),
    ('{"text": "a", "label": -Infinity}', "line 2 of .* has -Infinity, which JSON does not"),
    ('{"text": ["a", "b"], "label": 1}', r"line 2 of a.jsonl must have a text for 'text', got \["),
    ('{"text": 7, "label": 1}', "line 2 of a.jsonl must have a text for 'text', got 7"),
    ('{"text": "a", "label": [1]}', r"line 2 of a.jsonl must have one value for 'label', got \[1"),
    ('{"text": "a", "label": {"x": 1}}', "line 2 of a.jsonl must have one value for 'label', got"),
    ('{"text": "a", "label": null}', "line 2 of a.jsonl has no value for 'label'"),
    ('{"text": "a"}', "line 2 of a.jsonl has no value for 'label'"),
    ('{"text": "a", "label": 1, "text": "b"}', "line 2 of .* has the column 'text' 2 times"),
    ('{"text": "\\ud800", "label": 1}', "line 2 of a.jsonl must have a text that UTF-8 can hold"),
    ("[" * 100_000, "line 2 of .* is nested too deeply or has too long a number"),
    ('{"text": "a", "label": ' + "9" * 5000 + "}", "line 2 of .* is nested too deeply or has too"),
    ("[1, 2]", r"line 2 of .* must be a JSON object, got \[1, 2\]"),
]


@pytest.mark.parametrize(("content", "complaint"), CSV)
def test_csv_that_could_mean_two_things_is_refused(tmp_path, content, complaint):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=complaint):
        task_from_file(path, least=1)


@pytest.mark.parametrize(("line", "complaint"), JSON_LINES)
def test_json_lines_that_could_mean_two_things_are_refused(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' + line + "\n")
    with pytest.raises(UsageError, match=complaint) as refused:
        task_from_file(path, least=1)
    assert len(str(refused.value)) <= LONGEST


def test_what_a_cell_may_hold(tmp_path):
    """Quotes, commas and line ends in a text; labels of JSON that are no text."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"a ""b"", c\r\nd",up\r\ne\xc2\xa0\x0cf,up\r\n')
    task = task_from_file(path, least=1)
    assert task.inputs == ('a "b", c\r\nd', "e\xa0\x0cf") and task.classes == ("up",)
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a\x85b", "label": label} for label in (1, "1", True, 0.5, " x ")]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    task = task_from_file(path, least=1)
    assert task.classes == ("0.5", "1", "true", "x") and task.labels == (1, 1, 2, 0, 3)
    assert set(task.inputs) == {"a\x85b"}


@pytest.mark.parametrize("command", ["score", "compare", "explain"])
def test_commands_name_the_line(tmp_path, tiny_model, capsys, command):
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,up\n"b,down\n')
    arguments = [command, "--model", tiny_model, "--data", path, "--out", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    assert f"headwise {command}: line 3 of {path} is not CSV" in capsys.readouterr().err


# Labels.

SHIFTED = {"1": 0, "2": 1, "3": 2}  # a model of five stars: names that are numbers of others


@pytest.mark.parametrize(
    ("labels", "known", "read_as", "wanted"),
    [
        (["0", "1", "2"], SHIFTED, None, [0, 1, 2]),  # "0" is no name: these are numbers
        (["1", "2", "3"], SHIFTED, None, [0, 1, 2]),  # "3" is no number: these are names
        (["2", "1"], SHIFTED, "names", [1, 0]),
        (["2", "1"], SHIFTED, "numbers", [2, 1]),
        (["up", "down"], {"down": 0, "up": 1}, None, [1, 0]),
        (["1", "0"], {"down": 0, "up": 1}, None, [1, 0]),
        (["0", "1"], {"0": 0, "1": 1}, None, [0, 1]),  # both readings agree
    ],
)
def test_labels_are_names_or_numbers(labels, known, read_as, wanted):
    assert class_numbers(labels, known, read_as) == dict(zip(labels, wanted, strict=True))


@pytest.mark.parametrize(
    ("labels", "known", "read_as", "complaint"),
    [
        (
            ["1", "2"],
            SHIFTED,
            None,
            "label '1' is the name of class 0 of the model and also the number of another class: "
            "say --labels-are names or --labels-are numbers",
        ),
        (["0", "3"], SHIFTED, None, "label '0' is none of the model's classes: '1', '2', '3'"),
        (["up", "1"], {"down": 0, "up": 1}, None, "label '1' is none of the model's classes: 'do"),
        (["0"], SHIFTED, "names", "label '0' is none of the model's classes: '1', '2', '3'"),
        (["3"], SHIFTED, "numbers", "label '3' is none of the model's class numbers: '0', '1', "),
    ],
)
def test_labels_are_never_guessed(labels, known, read_as, complaint):
    with pytest.raises(UsageError) as refused:
        class_numbers(labels, known, read_as)
    assert str(refused.value).startswith(complaint)


@settings(max_examples=200, deadline=None)
@given(
    known=st.permutations(range(4)),
    labels=st.lists(st.integers(0, 5).map(str), min_size=1, max_size=5),
)
def test_labels_have_one_reading_or_none(known, labels):
    label2id = {str(name): number for name, number in enumerate(known, 1)}
    readings = [
        [read[label] for label in labels]
        for read in (label2id, {str(n): n for n in known})
        if all(label in read for label in labels)
    ]
    try:
        found = class_numbers(labels, label2id)
    except UsageError:
        assert not readings or readings[0] != readings[1]
    else:
        assert [found[label] for label in labels] == readings[0] == readings[-1]


def test_explain_and_score_ask_how_labels_are_meant(tmp_path, capsys):
    """The labels of faults that were found: 0, 1, 2 became 0, 0, 1."""
    from support.compare_fixtures import write_model

    model = write_model(tmp_path / "model", num_labels=3)
    config = json.loads((model / "config.json").read_text())
    config.update(id2label={n: str(n + 1) for n in range(3)}, label2id=SHIFTED)
    (model / "config.json").write_text(json.dumps(config))
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "the film is good,1\nthe plot is bad,2\n" * 4)
    for command in ("score", "explain"):
        arguments = [command, "--model", str(model), "--data", str(path)]
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert f"headwise {command}: label '1' is the name of class 0 of the model and" in message
    out = ["--labels-are", "numbers", "--metrics", "michel", "--json", str(tmp_path / "a.json")]
    assert main(["score", "--model", str(model), "--data", str(path), *out]) == 0
    numbers = json.loads((tmp_path / "a.json").read_text())["scores"]
    out[1] = "names"
    assert main(["score", "--model", str(model), "--data", str(path), *out]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["scores"] != numbers


def test_labels_of_explain_are_without_the_spaces_around_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na, up \nb,down\n")
    options = SimpleNamespace(data=path, text_column="text", label_column=None, limit=10, seed=0)
    assert explain_data._texts(options) == (["a", "b"], ["up", "down"])


# Its excerpt in an error.


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80), most=st.integers(1, 60))
def test_printable(text, most):
    shown = printable(text, most)
    assert all(letter.isprintable() for letter in shown) and len(shown) <= most + 1
    if len(text) <= most and text.isprintable():
        assert shown == text


def test_errors_are_short_and_hold_no_control_characters():
    sentence = str(UsageError(f"label \x1b[2J{'x' * 5000}"))
    assert sentence.startswith(r"label \x1b[2Jxxx") and len(sentence) == LONGEST + 1
    assert quoted("a\x1b") == r"'a\x1b'" and quoted("x" * 100, 3) == "'xxx'…"
    assert quoted([1] * 100, 5) == "[1, 1…" and quoted(math.nan) == "nan"


def test_file_names_reach_the_terminal_escaped(tmp_path, tiny_model, capsys):
    path = tmp_path / "a\x1b[2J\u202eb.csv"
    path.write_text("text,label\n" + "good,up\nbad,down\n" * 3)
    arguments = ["compare", "--model", tiny_model, "--data", path, "--out", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert r"every label of a\x1b[2J\u202eb.csv needs at least 10 rows" in message
    assert main(["comp\x1bre" + "x" * 5000]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "\x1b" not in message and len(message) < 550
