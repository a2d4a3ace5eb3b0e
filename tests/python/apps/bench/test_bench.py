"""headwise bench: what it writes, what it refuses, and that it times only what is right."""

from __future__ import annotations

import json

import headwise as hw
import pytest
import torch
from headwise.apps.bench import contenders, entropy, layer, memory, timing
from headwise.apps.bench.cases import layer_goal
from headwise.apps.bench.contenders import CheckFailed, Layer, Shape
from headwise.apps.cli import main

QUICK = ("--rounds", "2", "--dtype", "float32", "--clock", "process")


def bench(tmp_path, *arguments) -> dict:
    path = tmp_path / "bench.json"
    if "--threads" not in arguments:
        arguments += ("--threads", "1")
    assert main(["bench", *map(str, arguments), *QUICK, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["format"], found["version"]) == ("headwise.bench", 1)
    assert found["settings"]["clock"] == "process"
    return found


def test_layer(tmp_path, capsys):
    found = bench(
        tmp_path, "layer", "--shapes", "3,16,32,4", "1,8,16,2", "--no-memory", "--note", "busy"
    )
    assert found["environment"]["note"] == "busy"
    cases = [result for result in found["results"] if result["what"] == "layer"]
    assert [case["heads"] for case in cases] == [1, 2, 3, 4, 1, 2]
    for case in cases:
        assert case["error"] < 1e-4
        assert case["yardstick"] == "k heads" or case["heads"] == case["shape"][3]
        assert {"headwise", "dense", "mask after", "nn.MultiheadAttention"} <= case["ms"].keys()
        median, low, high = (case["ratio"]["yardstick"][key] for key in ("median", "low", "high"))
        assert low <= median <= high
        assert case["goal"]["met"] == (median <= case["goal"]["limit"])
    mixed = [result for result in found["results"] if result["what"] == "mixed"]
    assert len(mixed) == 1  # a batch of one has one budget
    assert mixed[0]["heads"] == sum(mixed[0]["counts"]) / 3
    lines = [result for result in found["results"] if result["what"] == "line"]
    assert [fit["heads"] for fit in lines] == [[1, 2, 3, 4]]
    assert sum(goal["of"] for goal in found["goals"]) == len(cases) + len(mixed)
    printed = capsys.readouterr().out.splitlines()
    assert len([text for text in printed if text.startswith("layer ")]) == len(cases)
    assert any("R^2" in text for text in printed)


def test_train_and_gate(tmp_path):
    found = bench(
        tmp_path, "train", "gate", "--shapes", "2,8,16,4", "--fractions", "0.5", "--no-memory"
    )
    what = [(result["what"], result.get("gate")) for result in found["results"]]
    assert what == [("train", None), ("gate", "BudgetGate"), ("gate", "HardConcreteGate")]
    # The goal of gates is for sequences long enough that a layer has a cost.
    assert [bool(result["goal"]) for result in found["results"]] == [True, False, False]


@pytest.mark.skipif(not memory.measurable(), reason="this system does not record a peak")
def test_memory_is_that_of_the_call(tmp_path):
    found = bench(tmp_path, "layer", "--shapes", "8,512,128,4", "--fractions", "0.5", "--no-mixed")
    peak = next(result for result in found["results"] if result["what"] == "memory")
    output = 8 * 512 * 128 * 4
    inexact = 1 << 19  # Linux counts resident pages by processor and adds them up now and then
    # The dense layer holds q, k, v, context and output; whatever runs holds its output.
    assert peak["call_bytes"]["dense"] >= 4 * output - inexact
    sizes = peak["call_bytes"].values()
    assert all(output - inexact <= size < 64 * output for size in sizes), list(sizes)


def test_entropy(tmp_path):
    found = bench(tmp_path, "entropy", "--shapes", "2,24,16,4", "--no-memory")
    (result,) = found["results"]
    assert result["error"] < 1e-4
    assert result["yardstick"] == "scaled_dot_product_attention"


def test_decode(tmp_path):
    found = bench(tmp_path, "decode", "--shapes", "1,20,36,9", "2,40,36,9")
    kinds = [(r["what"], r["shape"][1]) for r in found["results"]]
    assert kinds == [("decode", 20), ("kept", 20), ("decode", 40), ("kept", 40), ("attend", 40),
                     ("memory", 40)]  # fmt: skip
    for result in found["results"][:-1]:
        assert result["error"] < 1e-5 and result["ratio"]["yardstick"]["median"] > 0
    assert found["results"][-1]["ratio"]["call"] == pytest.approx(1 / 3)
    assert len(found["goals"]) == 4


def test_tokens(tmp_path):
    found = bench(tmp_path, "tokens", "--shapes", "2,24,16,4", "--fractions", "0.5", "1")
    (result,) = found["results"]
    assert result["heads"] == 2 and result["error"] < 1e-4
    assert list(result["ratio"]) == ["yardstick", "dense", "mask after"]
    few = 2 * 48 * (24 * 8 + 2 * 16 * 8)  # attention and projections of 2 heads
    more = 2 * 48 * 16 * 8  # keys and values of the other heads
    assert result["multiplications"] == pytest.approx((few + more) / few)


def test_break_even(tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "BREAK_EVEN_WIDTH", 16)
    monkeypatch.setattr(layer, "BREAK_EVEN_HEADS", 2)
    monkeypatch.setattr(layer, "BREAK_EVEN_BATCHES", (1, 2))
    monkeypatch.setattr(layer, "BREAK_EVEN_LENGTHS", (4,))
    found = bench(
        tmp_path, "layer", "--shapes", "2,8,16,4", "--fractions", "1", "--no-memory", "--break-even"
    )
    result = found["results"][-1]
    assert result["what"] == "break-even"
    assert list(result["batches"]) == ["1", "2"] and list(result["lengths"]) == ["4"]
    assert result["batch"] in (None, 1, 2)


def test_model(tmp_path, tiny_model, tiny_texts):
    found = bench(
        tmp_path, "model", "--model", tiny_model, "--data", tiny_texts, "--text", "review",
        "--label", "mood", "--batch-size", "4", "--max-length", "16", "--out", tmp_path,
    )  # fmt: skip
    (result,) = found["results"]
    assert result["heads_a_layer"] == [2, 2]
    assert result["yardstick"] == "pruned"
    assert result["tokens"]["longest"] <= 16
    assert json.loads((tmp_path / "bench-model.json").read_text()) == found


def test_a_wrong_layer_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contenders, "TOLERANCE", {torch.float32: 0.0})
    arguments = ["bench", "layer", "--shapes", "2,8,16,4", "--threads", "1", *QUICK]
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("headwise bench: RuntimeError: headwise differs from the oracle by ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["layers"], "argument WHAT: invalid choice: 'layers'"),
        (["layer", "--shapes", "1,2,3"], "expected B,L,D,H, four positive numbers, got '1,2,3'"),
        (["layer", "--shapes", "1,2,30,4"], "H must divide D, got D=30 and H=4"),
        (["layer", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["layer", "--clock", "sun"], "argument --clock: invalid choice: 'sun'"),
        (["layer", "--threads", "0"], "argument --threads: must be positive, got 0"),
        (["gate", "--gates", "Gatter"], "cannot build the gate 'Gatter'"),
        (["model", "--model", "nowhere"], "there is no model folder nowhere"),
        (["layer", "--json", "no/folder/x.json"], "there is no folder no/folder"),
    ],
)
def test_bad_use(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and "Traceback" not in error


def test_training_runs_as_many_heads_as_asked():
    for training in (False, True):
        own = Layer(Shape(3, 5, 16, 4), torch.float32, torch.device("cpu"), 0, training)
        module = own.module(3)
        output, mask = contenders.observed(
            module, lambda module=module, x=own.x: module(x, x, x, need_weights=False)[0]
        )
        assert mask.count_nonzero(1).tolist() == [3, 3, 3]
        own.check(output, mask)
        with pytest.raises(CheckFailed, match="differs from the oracle"):
            own.check(output + 1, mask)


def test_goals():
    assert layer_goal(Shape(8, 128, 768, 12), 6, False).limit == 1.05
    assert layer_goal(Shape(1, 128, 768, 12), 6, False).limit == 1.15
    assert layer_goal(Shape(8, 128, 768, 12), 12, False).limit == 1.02
    assert layer_goal(Shape(8, 128, 768, 12), 12, True).limit == 1.10


def test_ratios_compare_the_times_of_one_round():
    times = timing.Times({"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 2.0], "c": [3.0, 6.0, 10.0]})
    assert times.ratio("a", {"b": 1.0}) == {"median": 2.0, "low": 2.0, "high": 2.5}
    assert times.ratio("a", {"b": 0.5, "c": 0.5})["median"] == 1.0
    assert times.fastest(["a", "b"]) == "b"
    fit = timing.line([1, 2, 3, 4], [3.0, 5.0, 7.0, 9.0])
    assert fit == {"slope": 2.0, "intercept": 1.0, "r_squared": 1.0}


def test_contenders_take_turns_and_what_comes_before_is_not_timed():
    order: list[str] = []
    timer = timing.Timer(rounds=2, clock="wall", device=torch.device("cpu"))
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = timer.measure(runs, before=lambda name: order.append("before " + name))
    assert order == ["before a", "a", "before b", "b"] * 4  # two rounds warm up
    assert [len(found) for found in times.seconds.values()] == [2, 2]


def test_long_cases_end_early():
    timer = timing.Timer(rounds=50, clock="wall", device=torch.device("cpu"), most_seconds=0)
    times = timer.measure({"a": lambda: None})
    assert len(times.seconds["a"]) == timing.LEAST_ROUNDS


def test_scaling(tmp_path, threads):
    found = bench(tmp_path, "scaling", "--shapes", "2,8,16,4", "--threads", "2")
    assert [result["threads"] for result in found["results"]] == [1, 2]
    for result in found["results"]:
        assert result["heads"] == 2
        assert result["ms"].keys() == result["speed_up"].keys() == {"headwise", "k heads", "dense"}
    assert set(found["results"][0]["speed_up"].values()) == {1.0}


def test_entropy_oracle_is_one_for_even_attention():
    q = torch.zeros(1, 2, 3, 4)
    assert entropy.oracle(q, q).allclose(torch.ones(1, 2, dtype=torch.float64))


def test_gate_selection_is_checked():
    from headwise.apps.bench.gate import check

    shape = Shape(2, 4, 8, 3)
    good = hw.gates.select_all(2, 3)
    check(good, shape)
    with pytest.raises(CheckFailed, match="not well formed"):
        check(good._replace(index=good.index.flip(1)), shape)
    with pytest.raises(CheckFailed, match="not well formed"):
        check(good._replace(count=good.count - 1), shape)
