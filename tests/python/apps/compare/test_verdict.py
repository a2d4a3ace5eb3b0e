"""The sentence that a study opens with, for every kind of outcome."""

import json
from pathlib import Path

import pytest
from headwise.apps.compare.figures import front_figure, latency_figure
from headwise.apps.compare.verdict import front, recommended, verdicts

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"


def entry(method, kind, keep, accuracy, ratio, spread=0.02):
    time = {"batch": 32, "length": None, "ratio": ratio}
    time |= {"ratio_low": ratio - spread, "ratio_high": ratio + spread}
    return {
        "task": "t", "method": method, "title": f"{method} method", "kind": kind,
        "keep_target": keep, "heads_mean": keep, "accuracy": accuracy,
        "accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01, "latency": [time],
    }  # fmt: skip


def difference(points, width=0.5):
    return {"points": points, "low": points - width, "high": points + width}


def study(*comparisons, ratio=0.82):
    """Comparisons of (keep, static - dense, dynamic - dense, dynamic - static)."""
    summary = [entry("dense", "dense", 1.0, 0.8, 1.0)]
    found = []
    for keep, static, dynamic, between in comparisons:
        own = {"task": "t", "keep_target": keep}
        for name, value in (("static", static), ("dynamic", dynamic)):
            if value is not None:
                own |= {name: name, f"{name}_minus_dense": value}
                accuracy = 0.8 + value["points"] / 100
                summary.append(entry(name, name, keep, accuracy, ratio))
        if between is not None:
            own["dynamic_minus_static"] = between
        found.append(own)
    task = {"name": "t", "title": "some task"}
    return {"tasks": [task], "summary": summary, "comparisons": found}


def sentence(*comparisons, **options):
    (found,) = verdicts(study(*comparisons, **options))
    return found["sentence"]


def test_choosing_is_worth_nothing_and_pruning_loses_nothing():
    same, lost = difference(0.1), difference(-2.0)
    rows = [(0.75, same, same, difference(0.0)), (0.5, same, same, difference(-0.1))]
    assert sentence(*rows, (0.25, lost, lost, difference(0.0))) == (
        "On this data choosing by the input is worth nothing: prune to half of the heads (static "
        "method) and save 18% of the time; nothing is lost."
    )


def test_choosing_is_worth_something_where_the_whole_interval_is_above_zero():
    told = sentence((0.25, difference(-2.5), difference(-1.7), difference(0.8)))
    assert told == (
        "On this data choosing by the input is worth 0.8 points at a quarter of the heads: dynamic "
        "method saves 18% of the time; 1.7 points of accuracy are lost."
    )


def test_a_small_test_says_that_it_cannot_tell():
    told = sentence((0.5, difference(-1.0, 4.0), difference(0.0, 4.0), difference(1.0, 4.0)))
    assert told == (
        "On this data this test is too small to tell whether choosing by the input is worth "
        "anything (-3.0 to +5.0 points): prune to half of the heads (static method) and save 18% "
        "of the time; whether accuracy is lost this test cannot tell (-5.0 to +3.0 points)."
    )


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(1.3, "and take 30% longer;"), (1.0, "and save no time;"), (0.6, "and save 40% of the time;")],
)
def test_time_is_told_as_it_was_measured(ratio, words):
    assert words in sentence((0.3, difference(0), difference(0), difference(0)), ratio=ratio)


def test_if_everything_loses_the_least_loss_is_recommended():
    told = sentence((0.75, difference(-1.5), None, None), (0.5, difference(-4.0), None, None))
    assert told == (
        "On this data, prune to three quarters of the heads (static method) and save 18% of the "
        "time; 1.5 points of accuracy are lost."
    )


def test_only_dynamic_methods():
    told = sentence((0.4, None, difference(0.0), None))
    assert told == (
        "On this data, dynamic method at 40% of the heads saves 18% of the time; nothing is lost."
    )


def test_a_dense_model_that_guesses_is_reported_instead():
    same = difference(0.0)
    result = study((0.5, same, same, same))
    result["tasks"][0]["classes"] = ["rotten", "fresh"]
    assert verdicts(result)[0]["sentence"].startswith("On this data")  # 80%
    result["summary"][0]["accuracy"] = 0.57
    (found,) = verdicts(result)
    assert found["sentence"] == (
        "The dense model has learned too little to compare with (57%; guessing gives 50%): train "
        "it longer (--dense-steps)."
    )
    assert found["tiles"] == [{"label": "accuracy", "value": "57.0%", "note": "dense"}]
    assert recommended(result, "t") is None


def test_the_recommended_model_is_that_of_the_tiles():
    result = study((0.5, difference(0.3), difference(0.0), difference(-0.3)))
    found = recommended(result, "t")
    assert found is result["summary"][1] and found["accuracy"] == pytest.approx(0.803)
    assert recommended({**result, "comparisons": []}, "t") is None


def test_a_task_without_comparisons_has_no_verdict():
    assert verdicts({**study(), "comparisons": []}) == []


def test_tiles_are_of_the_model_that_the_sentence_names():
    (found,) = verdicts(study((0.5, difference(0.3), difference(0.0), difference(-0.3))))
    assert found["tiles"] == [
        {
            "label": "accuracy",
            "value": "80.3%",
            "note": "dense 80.0%; +0.3 points (-0.2 to +0.8)",
        },
        {
            "label": "time",
            "value": "−18%",
            "note": "0.82 of dense (0.80 to 0.84); batch 32, inputs as they come",
        },
        {"label": "heads", "value": "50%", "note": "dense 100%; the same for every input"},
    ]


def test_the_front_is_what_no_other_beats_in_both():
    rows = [(0.5, 0.7), (0.6, 0.9), (0.61, 0.5), (0.61, 0.6), (0.7, 0.8), (0.7, 0.75)]
    entries = [entry(str(i), "static", 0.5, *row) for i, row in enumerate(rows)]
    found = front(entries)
    beaten = [
        e
        for e in entries
        if any(
            o is not e
            and o["accuracy"] >= e["accuracy"]
            and o["latency"][0]["ratio"] <= e["latency"][0]["ratio"]
            for o in entries
        )
    ]
    assert [e["method"] for e in found] == ["2", "5"]
    assert all((e in found) != (e in beaten) for e in entries)
    twins = [entry("a", "static", 0.5, 0.8, 0.5), entry("b", "static", 0.5, 0.8, 0.5)]
    assert [e["method"] for e in front(twins)] == ["a"]


@pytest.mark.parametrize(
    "name", ["compare-reviews", "compare-mixed", "compare-digits", "compare-speech"]
)
def test_stored_results_have_the_verdict_that_this_version_gives(name):
    result = json.loads((RESULTS / name / "results.json").read_text())
    assert result["verdicts"] == verdicts(result)


def test_a_time_outside_its_range_is_drawn_without_a_bar():
    """Of one seed, the ratio of two medians may lie outside the quartiles of the ratios."""
    result = study((0.5, difference(0.0), difference(-0.2), difference(-0.2)))
    for e in result["summary"]:
        e["latency"][0].update(ratio_low=e["latency"][0]["ratio"] + 0.01, ratio_high=2.0)
    front_figure(result).canvas.draw()
    latency_figure(result).canvas.draw()


def test_models_far_below_or_slower_than_all_that_matter_set_no_axis():
    result = study((0.5, difference(0.0), difference(-0.2), difference(-0.2)))
    result["summary"] += [
        entry("awful", "static", 0.5, 0.4, 0.7),
        entry("slow", "dynamic", 0.5, 0.79, 3.0),
    ]
    (axes,) = front_figure(result).axes
    assert axes.get_xlim()[1] < 1.2 and axes.get_ylim()[0] > 70
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1  static method, 50%"]
