"""headwise.trace: what it records, what it summarises, and that it leaves nothing behind."""

import itertools
import json
import threading

import headwise as hw
import numpy as np
import pytest
import torch
from headwise import _C
from headwise.explain.recording import holding, recording
from headwise.nn.instrumenting import instrument, scaled_heads
from support.architectures import ARCHITECTURES, HEADS
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hw.convert(ARCHITECTURES["BertModel"].build(), hw.RandomGate(keep=0.5))


def run(model):
    architecture = ARCHITECTURES["BertModel"]
    with torch.no_grad():
        return architecture.run(model, architecture.inputs())


def observers(model):
    return [layer._observers for layer in hw.attention_layers(model).values()]


def random_selection(batch, heads, generator):
    mask = torch.rand(batch, heads, generator=generator) < 0.5
    index = torch.full((batch, heads), -1, dtype=torch.int32)
    for b in range(batch):
        chosen = mask[b].nonzero().flatten().int()
        index[b, : len(chosen)] = chosen
    relevance = torch.rand(batch, heads, generator=generator)
    count = mask.sum(1).int()
    return mask, hw.Selection(index, count, mask.float() * 0.5, relevance, count / heads)


def test_records_what_the_gates_chose(model):
    seen = {name: [] for name in hw.attention_layers(model)}
    for name, layer in hw.attention_layers(model).items():
        layer.gate.register_forward_hook(
            lambda gate, args, selection, name=name: seen[name].append(selection)
        )
    with hw.trace(model) as t:
        run(model)
        run(model)
    run(model)
    assert t.layers == list(seen)
    for name, calls in t.history.items():
        assert len(calls) == 2
        for call, expected in zip(calls, seen[name], strict=False):
            for actual, wanted in zip(call, expected, strict=True):
                assert torch.equal(actual, wanted) and not actual.requires_grad
        assert torch.equal(t.selections[name].index, calls[-1].index)


def test_outputs_are_the_same_and_nothing_is_left_behind(model):
    hw.convert(model, hw.FixedGate(heads=[1, 3]))
    torch.manual_seed(5)
    expected = run(model)
    torch.manual_seed(5)
    with hw.trace(model):
        assert all(len(o) == 1 for o in observers(model))
        assert torch.equal(run(model), expected)
    assert not any(observers(model))


def test_an_exception_inside_restores(model):
    with pytest.raises(ZeroDivisionError), hw.trace(model) as t:
        run(model)
        1 / 0  # noqa: B018
    assert not any(observers(model))
    assert len(t.layers) == 2


def test_nested_traces_each_get_everything(model):
    with hw.trace(model) as outer:
        run(model)
        with hw.trace(model) as inner:
            run(model)
        run(model)
    assert [len(c) for c in outer.history.values()] == [3, 3]
    assert [len(c) for c in inner.history.values()] == [1, 1]
    assert not any(observers(model))


def test_copies_do_not_change_with_the_gate(model):
    hw.convert(model, hw.FixedGate())
    with hw.trace(model) as t:
        run(model)
    for layer in hw.attention_layers(model).values():
        layer.gate.scale.zero_()
    assert all((s.weight == 1).all() for s in t.selections.values())


def test_layers_without_a_gate_are_not_recorded(model):
    names = list(hw.attention_layers(model))
    hw.attention_layers(model)[names[0]].set_gate(None)
    with hw.trace(model) as t:
        run(model)
    assert t.layers == names[1:]


def test_trace_needs_a_converted_model():
    with pytest.raises(ValueError, match="Linear.* has no headwise.MultiheadAttention to trace"):
        with hw.trace(nn.Linear(2, 2)):
            pass
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        with hw.trace(3):
            pass


def reference_summary(mask):
    """mask bool [N, heads] -> the numbers of a TraceSummary, from their definitions."""
    mask = mask.numpy()
    fraction = mask.mean(1)
    distances = []
    for a, b in itertools.combinations(mask, 2):
        either = (a | b).sum()
        distances.append(1 - (a & b).sum() / either if either else 0.0)
    return {
        "sequences": len(mask),
        "mean_heads": mask.sum(1).mean(),
        "mean_fraction": fraction.mean(),
        "std_fraction": fraction.std(),
        "mean_jaccard_distance": np.mean(distances),
    }


def test_summaries_follow_their_definitions():
    generator = torch.Generator().manual_seed(7)
    core = _C.Trace()
    masks = {"a": [], "b": []}
    # 70 + 5 heads: more than one machine word, and a layer that begins inside one.
    for name, heads in (("a", 70), ("b", 5)):
        for batch in (3, 4):
            mask, selection = random_selection(batch, heads, generator)
            masks[name].append(mask)
            core.record(name, heads, *selection)
    masks = {name: torch.cat(parts) for name, parts in masks.items()}
    masks[None] = torch.cat([masks["a"], masks["b"]], 1)
    for name, mask in masks.items():
        summary = core.summary() if name is None else core.summary(name)
        for key, value in reference_summary(mask).items():
            assert getattr(summary, key) == pytest.approx(value, abs=1e-12), (name, key)
    document = json.loads(core.to_json())
    assert document["summary"]["std_fraction"] == core.summary().std_fraction
    assert document["layers"][1]["summary"]["mean_heads"] == core.summary("b").mean_heads


def test_summary_at_the_edges():
    core = _C.Trace()
    assert core.summary() is None
    _, selection = random_selection(1, 4, torch.Generator().manual_seed(0))
    core.record("a", 4, *selection)
    assert core.summary().mean_jaccard_distance is None
    assert core.summary().std_fraction == 0.0
    _, two = random_selection(2, 4, torch.Generator().manual_seed(0))
    core.record("b", 4, *two)
    assert core.summary() is None  # layers saw different numbers of inputs
    assert core.summary("b").sequences == 2
    none = hw.Selection(
        torch.full((2, 0), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 0),
    )  # fmt: skip
    core.record("no heads", 0, *none)
    assert core.summary("no heads").mean_fraction == 0.0
    assert core.summary("no heads").mean_jaccard_distance == 0.0
    core.clear()
    assert core.layers == []


def test_json_says_what_was_recorded(model, tmp_path):
    with hw.trace(model) as t:
        run(model)
    path = tmp_path / "trace.json"
    t.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    document = json.loads(path.read_text())
    assert document == t.to_dict()
    assert (document["format"], document["version"]) == ("headwise.trace", 1)
    assert document["summary"]["sequences"] == 3
    assert [layer["name"] for layer in document["layers"]] == t.layers
    for layer in document["layers"]:
        assert layer["num_heads"] == HEADS
        selection = t.selections[layer["name"]]
        (sequences,) = layer["calls"]
        for b, sequence in enumerate(sequences):
            heads = selection.index[b, : selection.count[b]].long()
            assert sequence["heads"] == heads.tolist()
            assert sequence["weight"] == selection.weight[b, heads].tolist()
            assert sequence["relevance"] == pytest.approx(selection.relevance[b].tolist())
            assert sequence["budget"] == selection.budget[b].item()


def test_json_writes_null_for_what_a_gate_does_not_give(model):
    hw.convert(model, hw.FixedGate(heads=[0]))
    with hw.trace(model) as t:
        run(model)
    sequence = t.to_dict()["layers"][0]["calls"][0][0]
    assert sequence == {"heads": [0], "weight": [1.0], "relevance": None, "budget": None}


def test_a_failed_save_leaves_nothing(model, tmp_path):
    with hw.trace(model) as t:
        run(model)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(OSError):
        t.save(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_core_refuses_what_does_not_fit():
    core = _C.Trace()
    index, count, weight = (
        torch.zeros(2, 3, dtype=torch.int32),
        torch.ones(2, dtype=torch.int32),
        torch.ones(2, 3),
    )
    with pytest.raises(TypeError, match="index must be int32, got Long"):
        core.record("a", 3, index.long(), count, weight)
    with pytest.raises(ValueError, match=r"weight must have shape \[2, 3\], got \[2, 4\]"):
        core.record("a", 3, index, count, torch.ones(2, 4))
    core.record("a", 3, index, count, weight)
    with pytest.raises(ValueError, match="num_heads of layer 'a' must stay 3, got 4"):
        core.record("a", 4, torch.zeros(2, 4, dtype=torch.int32), count, torch.ones(2, 4))
    with pytest.raises(IndexError, match="no selection was recorded for layer 'b'"):
        core.history("b")
    core.record("c", 3, index + 7, count, weight)
    with pytest.raises(ValueError, match="index of layer 'c' must be between 0 and 2, got 7"):
        core.summary("c")
    core.clear()
    core.record("c", 3, index, count + 7, weight)
    with pytest.raises(ValueError, match="count of layer 'c' must be between 0 and 3, got 8"):
        core.to_json()


def test_compiled_models_can_be_traced(model):
    hw.convert(model, hw.FixedGate(heads=[2]))
    layer = next(iter(hw.attention_layers(model).values()))
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, 3, layer.embed_dim)
    with torch.no_grad():
        expected, _ = compiled(x, x, x, need_weights=False)
        with hw.trace(layer) as t:
            actual, _ = compiled(x, x, x, need_weights=False)
    assert torch.equal(actual, expected)
    assert t.selections[""].count.tolist() == [1, 1]


def test_a_trace_belongs_to_its_thread(model):
    """What another thread runs through the model at the same time is not recorded."""
    opened, leave, traces = threading.Barrier(2), threading.Barrier(2), {}
    sizes = {"first": 2, "second": 5}

    def work(name):
        with hw.trace(model) as t:
            opened.wait(60)
            for _ in range(3):
                architecture = ARCHITECTURES["BertModel"]
                inputs = architecture.inputs()
                batch = {
                    key: value[:1].expand(sizes[name], *value.shape[1:])
                    for key, value in inputs.items()
                }
                with torch.no_grad():
                    architecture.run(model, batch)
            leave.wait(60)
        traces[name] = t

    threads = [threading.Thread(target=work, args=(name,)) for name in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, size in sizes.items():
        for calls in traces[name].history.values():
            assert [len(call.count) for call in calls] == [size] * 3
    assert all(not seen for seen in observers(model))


def test_an_analysed_model_is_refused_to_other_threads(model):
    """An analysis changes the model for as long as it lasts: others must not get its results."""
    results = []

    def other():
        try:
            run(model)
        except RuntimeError as error:
            results.append(str(error))

    def in_another_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with recording(model, lambda *_: None):
        run(model)
        in_another_thread()
    with holding(model, []), instrument(model) as opened:
        scaled_heads(opened)
        in_another_thread()
    assert len(results) == 2
    assert all("another thread analyses this model" in text for text in results)
    in_another_thread()
    assert len(results) == 2
