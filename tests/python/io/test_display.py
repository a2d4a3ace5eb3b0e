"""Results show themselves: HTML for notebooks, axes of matplotlib, a table of pandas."""

import builtins
import json
import math
import pickle
import sys
import types
from html.parser import HTMLParser

import headwise as hw
import matplotlib
import pytest
import torch
from headwise.analysis import score_agreement
from headwise.explain.document import Explanation, Roles
from headwise.io.display import Grid, layer_labels
from headwise.pruning import FfnPlan, Headroom, HeadroomRow, HiddenPlan, StructurePlan
from headwise.pruning.measured_headroom import Gain
from support.architectures import bert, bert_inputs
from support.explain_documents import explanation, hostile, use

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

NAMES = ["encoder.layer.0.attention.self.mha", "encoder.layer.1.attention.self.mha"]


def scores(metric="michel", sign=1.0):
    return hw.HeadScores(metric, {NAMES[0]: [0.1, 0.9, -0.2 * sign], NAMES[1]: [sign, 0.5]})


def traced():
    torch.manual_seed(0)
    model = hw.convert(bert("BertModel"), hw.BudgetGate(keep=0.5)).eval()
    with torch.no_grad(), hw.trace(model) as trace:
        model(**bert_inputs())
        model(**bert_inputs())
    return trace


def headroom():
    gain = Gain(0.02, 0.01, 0.03)
    row = HeadroomRow(0.5, 0.80, 0.82, 0.83, 0.79, Gain(0.1, 0.08, 0.12), gain, gain, gain)
    return Headroom(0.9, [row], 3, 100)


def structure_plan():
    heads = hw.plan(scores(), keep=0.6)
    hidden = HiddenPlan(4, [0, 2], [1.0, 1.0])
    return StructurePlan(heads, [FfnPlan("ffn", 8, [1, 2, 3])], [], hidden)


RESULTS = {
    "scores": (scores, 5, {"layer": NAMES[0], "head": 0, "score": 0.1}),
    "plan": (
        lambda: hw.plan(scores(), keep=0.6),
        5,
        {"layer": NAMES[0], "head": 0, "kept": False, "scale": 0.0},
    ),
    "structure plan": (
        structure_plan,
        4,
        {"part": "heads", "name": NAMES[0], "kept": 1, "of": 3},
    ),
    "trace": (traced, 8, None),
    "explanation": (lambda: Explanation(explanation()), None, None),
    "roles": (lambda: Roles(use()["roles"]), None, None),
    "agreement": (
        lambda: score_agreement({"a": scores(), "b": scores(sign=-1.0), "c": scores()}),
        3,
        None,
    ),
    "headroom": (headroom, 1, None),
}


@pytest.fixture(params=RESULTS)
def result(request):
    make, rows, first = RESULTS[request.param]
    return make(), rows, first


class Checker(HTMLParser):
    """Counts rows and sees that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.tags = [], 0, set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_notebooks_show_every_result(result):
    own, _, _ = result
    checked = Checker(own._repr_html_())
    assert "table" in checked.tags and checked.rows >= 2


def test_plots_are_on_the_axes_that_were_given_or_on_new_ones(result):
    own, _, _ = result
    axes = own.plot()
    assert isinstance(axes, Axes) and axes.get_title()
    figure, given = pyplot.subplots()
    assert own.plot(given) is given or own.plot(ax=given) is given
    figure.canvas.draw()
    pyplot.close("all")


def test_tables_have_a_row_each(result, monkeypatch):
    own, rows, first = result
    seen = []
    pandas = types.SimpleNamespace(DataFrame=lambda records: seen.extend(records) or "a frame")
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert own.to_frame() == "a frame"
    assert rows is None or len(seen) == rows
    assert first is None or seen[0] == first
    assert all(record.keys() == seen[0].keys() for record in seen) and seen[0]
    json.dumps(seen)  # plain numbers and texts


def test_what_is_not_installed_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("pandas", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        scores().to_frame()
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        scores().plot()
    assert "0.90" in scores()._repr_html_()


def test_a_traces_shares_are_those_of_its_selections():
    trace = traced()
    for record in trace._records():
        ran, weights = [], []
        for call in trace.history[record["layer"]]:
            for index, count, weight in zip(call.index, call.count, call.weight, strict=True):
                on = record["head"] in index[: int(count)].tolist()
                ran.append(on)
                weights += [weight[record["head"]].item()] * on
        assert record["share"] == pytest.approx(sum(ran) / len(ran))
        if weights:
            assert record["mean_weight"] == pytest.approx(sum(weights) / len(weights))
        else:
            assert record["mean_weight"] is None


def test_explanations_draw_the_input_that_is_asked_for():
    document = explanation()
    own = Explanation(document)
    for place, entry in enumerate(document["inputs"]):
        title = own.plot(input=place).get_title()
        assert title.startswith(f"input {place}: {entry['heads_on']} of {entry['heads']} heads ran")
    with pytest.raises(IndexError):
        own.plot(input=len(document["inputs"]))
    pyplot.close("all")


def test_hostile_texts_are_shown_as_text():
    for own in (Explanation(hostile(explanation())), Roles(hostile(use())["roles"])):
        shown = own._repr_html_()
        assert "<script" not in shown and "<img" not in shown
        Checker(shown)
    name = "<script>alert(1)</script>\x1b[2J"
    shown = hw.HeadScores(name, {name: [1.0]})._repr_html_()
    assert "<script" not in shown and "\x1b" not in shown
    Checker(shown)


def test_roles_are_still_a_dictionary():
    document = use()["roles"]
    own = Roles(document)
    assert own == document and json.loads(json.dumps(own)) == document
    assert pickle.loads(pickle.dumps(own)) == document
    row = own._records()[0]
    assert set(row) == {
        "layer",
        "site",
        "head",
        "role",
        "share",
        "low",
        "high",
        "baseline",
        "trials",
    }


def test_nothing_to_draw_is_refused_and_shown_as_nothing():
    empty = hw.HeadScores("none", {})
    Checker(empty._repr_html_())
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.plot()


def test_layers_without_heads_numbers_that_are_none_and_long_tables():
    plan = hw.HeadPlan(
        [hw.pruning.LayerPlan(f"layer.{i}", 3, [] if i % 2 else [0]) for i in range(70)]
    )
    shown = plan._repr_html_()
    assert "and 10 more rows" in shown and Checker(shown).rows == 61
    ragged = hw.HeadScores("odd", {"a.0": [math.nan, math.inf, -3.0], "a.1": []})
    Checker(ragged._repr_html_())
    ragged.plot().figure.canvas.draw()
    assert Grid("t", ["r"], ["c"], [[None]]).largest == 1.0
    pyplot.close("all")


def test_labels_leave_out_what_all_layers_share():
    assert layer_labels(NAMES) == ["0", "1"]
    assert layer_labels(["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]) == [
        "encoder",
        "decoder",
    ]
    assert layer_labels(["a.1.x", "a.10.x", "a.2.y"]) == ["1.x", "10.x", "2.y"]
    assert layer_labels([""]) == ["(the model)"]
    assert layer_labels(["a", "a.b"]) == ["a", "a.b"]
