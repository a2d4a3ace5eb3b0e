"""``headwise compare`` from end to end: a tiny random BERT, a task made for it, a few steps."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.compare import methods, settings
from headwise.apps.compare.methods import METHODS

RUN_KEYS = {  # what the design promises of each run in results.json
    "task", "model", "method", "kind", "keep_target", "heads_mean", "accuracy", "latency_ms",
    "latency_ratio_to_dense", "macs_ratio_to_dense", "train_steps", "seed",
}  # fmt: skip
SMALL = ["--quick", "--steps", "6", "--dense-steps", "12", "--precision", "float32"]


def arguments(model: Path, texts: Path, out: Path) -> list[str]:
    task = ["--data", texts, "--text", "review", "--label", "mood", "--group", "film"]
    return [str(a) for a in ("compare", "--model", model, *task, "--out", out, *SMALL)]


@pytest.fixture(scope="module", autouse=True)
def little_measuring():
    """These tests do not check times."""
    original = settings.preset

    def preset(size: str, seed: int) -> settings.Settings:
        return dataclasses.replace(original(size, seed), latency_s=0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "preset", preset)
        yield


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_texts, tmp_path_factory) -> Path:
    """The folder of a study with every method at two budgets."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = arguments(tiny_model, tiny_texts, out)
    command += ["--keep", "0.5", "0.25", "--methods", *METHODS, "--keep-models"]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def results(finished) -> dict:
    return json.loads((finished / "results.json").read_text())


def test_every_run_has_what_the_design_promises(results):
    runs = results["runs"]
    dense = sum(m.kind == "dense" for m in METHODS.values())
    assert len(runs) == 1 + dense + 2 * (len(METHODS) - dense)
    for run in runs:
        assert RUN_KEYS <= set(run)
        assert run["kind"] in ("dense", "static", "dynamic")
        assert 0 <= run["accuracy"] <= 1 and 0 <= run["heads_mean"] <= 1
        assert run["heads_mean"] > 0 or "share_kept" in run
        assert ("method_seconds" in run) == (run["method"] != "dense")
        assert run["latency_ms"] > 0 and run["latency_ratio_to_dense"] > 0
        low, high = run["accuracy_interval"]
        assert low <= run["accuracy"] <= high
        assert "correct" not in run
    for run in runs:
        trains = run["method"] == "dense" or METHODS[run["method"]].trains
        assert (run["train_steps"] > 0) == trains
    assert {run["train_steps"] for run in runs if run["train_steps"] not in (0, 12)} == {6}


def test_static_methods_meet_the_budget_exactly_and_never_vary(results):
    for run in results["runs"]:
        if "share_kept" in run:  # the budget is of the whole model, not of its heads
            assert run["share_kept"] <= run["keep_target"] + 0.02 and run["heads_std"] == 0
            assert run["macs_ratio_to_dense"] < 1
        elif run["kind"] == "static":
            assert run["heads_mean"] == run["keep_target"]
            assert run["heads_std"] == 0 and run["jaccard_distance"] == pytest.approx(0, abs=1e-9)
            assert run["macs_ratio_to_dense"] < 1
            assert run["attention_macs_ratio_to_dense"] == pytest.approx(run["keep_target"])
        if run["kind"] == "dense":
            assert run["heads_mean"] == 1
            # The gate of a full budget is not free.
            gate = 0.01 if run["method"] == "budget-full" else 0.0
            assert 1 <= run["macs_ratio_to_dense"] <= 1 + gate
        if run["method"] == "requested-budget":
            assert run["heads_min"] == run["heads_max"] == run["keep_target"]


def test_the_environment_and_the_findings_are_told(results):
    assert {"processor", "threads", "torch", "headwise", "seeds"} <= set(results["environment"])
    assert any(s.startswith("At 50% of the heads") for s in results["findings"])
    assert any("Jaccard" in sentence for sentence in results["findings"])
    missed = [e for e in results["summary"] if e["missed"]]
    assert len(missed) == sum(s.startswith("Missed: ") for s in results["findings"])
    assert [c["keep_target"] for c in results["comparisons"]] == [0.5, 0.25]
    for entry in results["summary"]:
        ratios = [time["ratio"] for time in entry["latency"]]
        assert len(ratios) == len(results["settings"]["shapes"]) and min(ratios) > 0
        assert entry["method"] != "dense" or set(ratios) == {1.0}
    shapes = [s for s in results["findings"] if "than dense" in s]
    assert len(shapes) == len(results["settings"]["shapes"])


def test_headroom_is_told_before_the_runs(results):
    (room,) = results["headroom"]
    assert room["task"] == results["tasks"][0]["name"] and 0 <= room["dense"] <= 1
    assert [row["keep"] for row in room["rows"]] == [0.5, 0.25]
    for row in room["rows"]:
        assert row["lost"]["mean"] == pytest.approx(room["dense"] - row["static"])
        assert row["won"]["mean"] == pytest.approx(row["routed"] - row["static"])
    assert "worth trying" in room["sentences"][-1]
    by_method = {(run["method"], run["keep_target"]): run for run in results["runs"]}
    bank = by_method["bank", 0.5]
    assert bank["heads_mean"] == pytest.approx(0.5) and bank["plans"] == 4
    fitted = by_method["fitted-gates", 0.5]
    assert fitted["heads_mean"] == pytest.approx(0.5, abs=0.1) and "swapped_accuracy" in fitted
    assert fitted["explained"] and max(fitted["explained"].values()) <= 1.0


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]


def test_the_page_stands_alone(finished, results):
    text = (finished / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.links == []
    for sentence in results["findings"]:
        assert html.escape(sentence, quote=False) in text.replace("&#39;", "'").replace(
            "&#34;", '"'
        )
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    tables = json.loads(data)["compared"]["tables"]
    (shown,) = [t for t in tables if "time" in [name for name, *_ in t["columns"]]]
    assert {row[1] for row in shown["rows"]} == {run["title"] for run in results["runs"]}
    time = [name for name, *_ in shown["columns"]].index("time")
    assert shown["rows"][0][time].startswith("1 (")
    for name in ("accuracy", "latency"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_kept_models_can_be_loaded(finished):
    folders = sorted((finished / "models").iterdir())
    dense = sum(m.kind == "dense" for m in METHODS.values())
    assert len(folders) == dense + 2 * (len(METHODS) - dense)
    pruned = hw.load(finished / "models" / "texts-michel-finetuned-0.5-0")
    assert sum(layer.num_heads for layer in hw.attention_layers(pruned).values()) == 4
    dynamic = hw.load(finished / "models" / "texts-budget-gate-0.25-0")
    ids = torch.tensor([[2, 6, 11, 3]])
    with hw.trace(dynamic) as trace:
        dynamic(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert len(trace.selections) == 2


def test_a_second_run_trains_nothing(finished, tiny_model, tiny_texts, monkeypatch, capsys):
    def refuse(*unused, **also_unused):
        raise AssertionError("nothing should be trained")

    monkeypatch.setattr("headwise.apps.compare.study.finetune", refuse)
    monkeypatch.setattr("headwise.apps.compare.workbench.finetune", refuse)
    before = json.loads((finished / "results.json").read_text())
    command = arguments(tiny_model, tiny_texts, finished)
    command += ["--keep", "0.5", "0.25", "--methods", *METHODS]
    assert main(command) == 0
    assert capsys.readouterr().err.count("finished before") == len(before["runs"])
    assert json.loads((finished / "results.json").read_text()) == before


def test_an_interrupted_study_goes_on(tiny_model, tiny_texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [*arguments(tiny_model, tiny_texts, out), "--methods", "random", "budget-gate"]
    original = METHODS["budget-gate"]

    def interrupted(bench, keep, steps):
        raise KeyboardInterrupt

    monkeypatch.setitem(
        methods.METHODS, "budget-gate", dataclasses.replace(original, run=interrupted)
    )
    assert main(command) == 1
    assert "the same command resumes from there" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    monkeypatch.setitem(methods.METHODS, "budget-gate", original)

    assert main(command) == 0
    errors = capsys.readouterr().err
    assert errors.count("finished before") == 3  # dense and the two random runs
    assert "Traceback" not in errors
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 4


def test_other_settings_are_another_study(finished, tiny_model, tiny_texts, capsys):
    command = arguments(tiny_model, tiny_texts, finished)
    command[command.index("--steps") + 1] = "3"
    assert main([*command, "--methods", "random-posthoc"]) == 0
    assert "finished before" not in capsys.readouterr().err


def test_the_table_goes_to_standard_output_and_json_where_asked(
    tiny_model,
    tiny_texts,
    tmp_path,
    capsys,
):
    command = [*arguments(tiny_model, tiny_texts, tmp_path / "out"), "--methods", "random-posthoc"]
    assert main([*command, "--json", str(tmp_path / "copy.json")]) == 0
    captured = capsys.readouterr()
    assert "texts.csv" in captured.out and "50% of the heads" in captured.out
    assert "What was found" in captured.out
    assert "\r" not in captured.err  # no bars: this is not a terminal
    copy = json.loads((tmp_path / "copy.json").read_text())
    assert copy == json.loads((tmp_path / "out" / "results.json").read_text())
