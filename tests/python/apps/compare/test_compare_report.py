"""What ``headwise compare`` reports about time, and its progress."""

from __future__ import annotations

import copy
import io
import re
import sys

import pytest
import torch
from headwise.apps.compare import findings, measure, progress, table
from headwise.apps.compare.figures import headroom_figure, latency_figure
from headwise.apps.tasks.examples import TextExamples
from headwise.apps.tasks.shapes import Shape


def run_of(method, kind, keep, seed, ratio, heads=None):
    low, high = (0.97, 1.02) if kind == "dense" else (ratio - 0.01, ratio + 0.01)
    times = [
        {"batch": 1, "length": None, "ms": 3.0 * ratio, "dense_ms": 3.0, "ratio": ratio,
         "ratio_low": low, "ratio_high": high, "rounds": 9},
        {"batch": 8, "length": 128, "ms": 50 * ratio, "dense_ms": 50.0, "ratio": ratio / 2,
         "ratio_low": low / 2, "ratio_high": high / 2, "rounds": 9},
    ]  # fmt: skip
    return {
        "task": "t", "method": method, "title": method, "kind": kind, "keep_target": keep,
        "accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "train_steps": 3, "seed": seed,
        "heads_mean": keep if heads is None else heads, "heads_std": 0.05, "jaccard_distance": 0.3,
        "latency_ms": times[0]["ms"], "latency_ratio_to_dense": ratio, "latency": times,
        "macs_ratio_to_dense": 0.8, "attention_macs_ratio_to_dense": 0.4,
        "validation_accuracy": 0.8,
    }  # fmt: skip


def runs():
    return [
        *(run_of("dense", "dense", 1.0, seed, 1.0) for seed in (0, 1)),
        *(run_of("michel", "static", 0.5, seed, 0.80) for seed in (0, 1)),
        *(run_of("michel", "static", 0.25, seed, 0.60) for seed in (0, 1)),
        *(run_of("gate", "dynamic", 0.5, seed, 1.06 + 0.08 * seed) for seed in (0, 1)),
        *(run_of("gate", "dynamic", 0.25, seed, 0.66) for seed in (0, 1)),
    ]


def test_sentences_of_time_are_about_the_models_of_the_table():
    """What they say is in the rows beside them: at 50% the gates take 1.10 of dense."""
    summary = findings.summarise(runs())
    rows = {(e["method"], e["keep_target"]): e["latency"][0] for e in summary}
    assert rows["gate", 0.5] == {
        "batch": 1, "length": None, "ms": pytest.approx(3.3), "ratio": pytest.approx(1.1),
        "ratio_low": 1.06, "ratio_high": pytest.approx(1.14),
    }  # fmt: skip
    assert findings._time_sentences(summary) == [
        "Batch 1, inputs as they come: 1 of 2 dynamic models were faster than dense, those with up "
        "to 25% of the heads (0.66 to 1.10 of its time); at the same budget it took 24% longer "
        "than a pruned model, in the median (+10% to +38%).",
        "Batch 8, 128 tokens: every dynamic model was faster than dense (0.33 to 0.55 of its "
        "time); at the same budget it took 24% longer than a pruned model, in the median (+10% to "
        "+38%).",
    ]
    slow = [e | {"latency": [t | {"ratio": 1.2} for t in e["latency"]]} for e in summary]
    assert (
        "no dynamic model was faster than dense (1.20 to 1.20"
        in (findings._time_sentences(slow)[0])
    )
    assert findings._time_sentences([e for e in summary if e["kind"] != "dynamic"]) == []


def test_dense_is_one_and_its_row_shows_the_noise():
    summary = findings.summarise(runs())
    dense = summary[0]
    column = [name for name, _ in table.COLUMNS].index("time")
    assert table.cells(dense, dense)[column] == "1 (0.97-1.02)"
    unknown = dense | {"latency": [dense["latency"][0] | {"ratio_low": None}]}
    assert table.cells(unknown, unknown)[column] == "1"
    one = findings.summarise([run for run in runs() if run["seed"] == 0])
    assert table.cells(one[0], one[0])[column] == "1 (0.97-1.02)"
    assert table.cells(one[1], one[0])[column] == "0.80"


def test_the_dense_model_is_measured_against_itself():
    model = torch.nn.Module()
    model.forward = lambda input_ids, attention_mask: input_ids

    examples = TextExamples([[1, 2, 3]] * 9, [0] * 9)
    shapes, device = [Shape(2), Shape(2, 4)], torch.device("cpu")
    same = measure.latency(model, model, examples, shapes, device, budget_s=0.01)
    assert [time["ratio"] for time in same] == [1.0, 1.0]
    assert all(time["ratio_low"] <= time["ratio_high"] for time in same)
    other = measure.latency(model, copy.deepcopy(model), examples, shapes, device, budget_s=0.01)
    assert all(time["ratio_low"] <= time["ratio"] <= time["ratio_high"] for time in other)


def test_the_figure_of_latency_has_a_point_for_each_budget_not_for_each_seed():
    figure = latency_figure({"summary": findings.summarise(runs())})
    first = figure.axes[0]
    lines = {line.get_label(): line for line in first.get_lines()}
    assert lines["gate"].get_xdata() == pytest.approx([25, 50])
    assert lines["gate"].get_ydata() == pytest.approx([0.66, 1.10])
    bars = [bar.get_segments() for bar in first.collections if hasattr(bar, "get_segments")]
    spans = [(s[0][1], s[1][1]) for own in bars for s in own if s[0][0] == pytest.approx(50)]
    assert (pytest.approx(1.06), pytest.approx(1.14)) in spans


def test_progress_without_a_terminal_is_lines(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    told = progress.Progress()
    told.start(2)
    told.stage("reading")
    told.begin_training("gate, 50%", 2)
    told.step()
    told.step()
    told.end_training()
    told.step()  # of a method that measures without training
    told.finished("a", run_of("gate", "dynamic", 0.5, 0, 1.0))
    said = sys.stderr.getvalue()
    assert "\r" not in said and "\033" not in said and said.endswith("\n")
    assert re.fullmatch(
        r"reading\ngate, 50%: 2 steps\ngate, 50%: step 1 of 2, \d+ s left\n"
        r"gate, 50%: step 2 of 2, 0 s left\n"
        r"\[1/2\] t, seed 0: gate at 50%: 80.0% with 50.0% of heads \(\d+ s\)\n",
        said,
    )
    progress.Progress(show=False).stage("nothing")
    assert sys.stderr.getvalue() == said


def test_headroom_shows_equal_values_and_no_noise():
    """One budget, half a point apart: every mark is seen, and the scale is not the noise's."""
    row = {"keep": 0.5, "static": 0.504, "routed": 0.504, "ceiling": 0.504, "swapped": 0.5}
    room = {"task": "t", "dense": 0.508, "rows": [row], "sentences": []}
    axes = headroom_figure({"headroom": [room]}).axes[0]
    marks = [line for line in axes.get_lines() if line.get_label() != "dense"]
    places = {(round(float(m.get_xdata()[0]), 3), float(m.get_ydata()[0])) for m in marks}
    assert len(marks) == len(places) == 4
    low, high = axes.get_ylim()
    assert high - low >= 4.99
