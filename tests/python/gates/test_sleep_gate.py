"""SleepGate: heads fall asleep, wake when their scores recover, and what moved is recorded."""

import copy
import json
import pickle

import headwise as hw
import pytest
import torch
from headwise.gates.sleep import HeadMove

ops = torch.ops.headwise
D, H = 8, 4


def train(gates, worth_of, steps, progress_of, batch=4):
    """Steps whose loss feels head h of the pooled gates by worth_of(step)[h]."""
    x = torch.randn(batch, 3, D)
    for step in range(steps):
        hw.anneal(gates, progress_of(step))
        weight = torch.cat([gate(x).weight for gate in gates], 1)  # [B, N]
        (weight * worth_of(step)).sum(1).mean().backward()


def linked(count=2, **options):
    gates = torch.nn.ModuleList([hw.SleepGate(**options).bind(D, H) for _ in range(count)])
    return hw.link_gates(gates)


def awake(gates):
    return torch.cat([gate.awake for gate in gates]).nonzero().flatten().tolist()


def test_awake_heads_against_plain_python():
    torch.manual_seed(0)
    for _ in range(20):
        score, before = torch.rand(9).round(decimals=1), (torch.rand(9) > 0.5).float()
        for count in (0, 4, 9):
            after = ops.awake_heads(score, before, count, 0.3)
            held = [s * (1.3 if a else 1.0) for s, a in zip(score.double(), before, strict=True)]
            best = sorted(range(9), key=lambda head: (-held[head], head))[:count]
            assert after.nonzero().flatten().tolist() == sorted(best)


def test_score_is_the_average_of_absolute_gradients():
    gate = linked(1, decay=0.5, every=100)[0]
    gradients = [torch.randn(3, H) for _ in range(3)]
    for gradient in gradients:
        (gate(torch.randn(3, 2, D)).weight * gradient).sum().backward()
    gate(torch.randn(3, 2, D))
    first, second, third = (gradient.abs().sum(0) for gradient in gradients)
    torch.testing.assert_close(gate.score, 0.5 * (0.5 * first + 0.5 * second) + 0.5 * third)


def test_a_step_that_overflowed_leaves_the_scores():
    gate = linked(1, decay=0.5, every=100)[0]
    x = torch.randn(3, 2, D)
    for value in (1.0, float("inf"), float("nan"), 3.0):
        (gate(x).weight * value).sum().backward()
    gate(x)
    torch.testing.assert_close(gate.score, torch.full((H,), 0.5 * 3.0 + 0.5 * 9.0))


def test_without_scores_nothing_moves_and_that_is_said():
    gates = linked(keep=0.25, every=1, asleep_by=0.0)
    for gate in gates:
        gate(torch.randn(2, 3, D)).weight.sum().mul(float("nan")).backward()
    with pytest.warns(UserWarning, match="has a score, so none moves: no finite gradient has re"):
        gates[0](torch.randn(2, 3, D))
    assert awake(gates) == list(range(8)) and hw.gates.head_moves(gates) == []


def test_the_planted_heads_stay_awake():
    worth = torch.tensor([5.0, 0.1, 0.2, 4.0, 0.3, 0.1, 3.0, 0.2])
    gates = linked(keep=3 / 8, every=5, asleep_by=0.5)
    train(gates, lambda step: worth, 60, lambda step: step / 59)
    assert awake(gates) == [0, 3, 6]
    moves = hw.gates.head_moves(gates)
    assert len(moves) == 5 and {move["event"] for move in moves} == {"sleeps"}
    assert [move["step"] for move in moves] == sorted(move["step"] for move in moves)
    assert {(move["layer"], move["head"]) for move in moves} == {
        ("0", 1), ("0", 2), ("1", 0), ("1", 1), ("1", 3)
    }  # fmt: skip
    assert json.loads(json.dumps(moves)) == moves


def test_a_head_wakes_when_its_score_recovers_and_moves_to_another_layer():
    before = torch.tensor([5.0, 4.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    after = torch.tensor([5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 4.0, 0.1])
    gates = linked(keep=0.25, every=5, asleep_by=0.0, decay=0.5, settled_from=1.0)
    train(gates, lambda step: before if step < 30 else after, 80, lambda step: 0.5)
    assert awake(gates) == [0, 6]
    last = hw.gates.head_moves(gates)[-2:]
    assert [(m["layer"], m["head"], m["event"]) for m in last] == [
        ("0", 1, "sleeps"), ("1", 2, "wakes")
    ]  # fmt: skip
    assert last[1]["score"] > last[0]["score"] and last[0]["step"] > 30


def test_margin_keeps_near_ties_still():
    close = torch.tensor([1.0, 1.1, 0.1, 0.1])
    gates = linked(1, keep=0.25, every=2, asleep_by=0.0, settled_from=1.0, margin=0.2)
    gates[0].start_from(torch.tensor([1.0, -1.0, -1.0, -1.0]), 0.25)
    train(gates, lambda step: close, 20, lambda step: 0.5)
    assert awake(gates) == [0] and not gates[0].moves


def test_nothing_moves_once_settled():
    gates = linked(keep=0.25, every=1, asleep_by=0.0, settled_from=0.5)
    train(gates, lambda step: torch.rand(2 * H), 10, lambda step: 0.6)
    assert awake(gates) == list(range(2 * H)) and not hw.gates.head_moves(gates)


def test_selected_execution_probes_the_sleeping():
    gate = linked(1, keep=0.5, execution="selected", probe_every=3, every=100)[0]
    gate.start_from(torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.5)
    counts = [gate(torch.randn(2, 3, D)).count[0].item() for _ in range(6)]
    assert counts == [2, 2, 4, 2, 2, 4]
    assert gate.eval()(torch.randn(2, 3, D)).count.tolist() == [2, 2]


def test_in_a_model_copies_and_files_keep_the_state(tmp_path):
    torch.manual_seed(0)

    def build():
        return torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(D, H, 16, batch_first=True, dropout=0.0), 2
        )

    model = hw.convert(build(), hw.SleepGate(0.5, every=2, asleep_by=0.2)).train()
    for step in range(12):
        hw.anneal(model, step / 12)
        model(torch.randn(4, 5, D)).square().sum().backward()
    moves = hw.gates.head_moves(model)
    assert len(moves) >= 4 and all(move["layer"].startswith("layers.") for move in moves)
    assert all(
        layer.out_proj.weight.grad.isfinite().all() for layer in hw.attention_layers(model).values()
    )
    x = torch.randn(2, 4, D)
    hw.save(model, tmp_path / "m")
    loaded = hw.load(tmp_path / "m", model=build())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert hw.gates.head_moves(other) == moves
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "elsewhere"}, "is of head 0 of layer 'elsewhere', which no SleepGate of the"),
        ({"head": 99}, "is of head 99 of layer 'self_attn', which no SleepGate of the model has"),
        ({"event": "dreams"}, "entry 0 of 'moves' of .* is not a move of a head"),
        ({"step": "one"}, "entry 0 of 'moves' of .* is not a move of a head"),
        ({"more": 1}, "entry 0 of 'moves' of .* is not a move of a head"),
    ],
)
def test_moves_in_a_file_that_are_none(tmp_path, change, message):
    def build():
        return torch.nn.TransformerEncoderLayer(D, H, 16, batch_first=True)

    model = hw.convert(build(), hw.SleepGate(0.5))
    gate = next(iter(hw.attention_layers(model).values())).gate
    gate.moves.append(HeadMove(1, 0.5, 0, "sleeps", 0.25))
    hw.save(model, tmp_path / "m")
    path = tmp_path / "m" / "headwise.json"
    document = json.loads(path.read_text())
    assert document["moves"][0]["score"] == 0.25
    document["moves"][0].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        hw.load(tmp_path / "m", model=build())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hw.SleepGate(0.0), "keep must be in (0, 1], got 0.0"),
        (lambda: hw.SleepGate(every=0), "every must be at least 1, got 0"),
        (lambda: hw.SleepGate(decay=1.0), "decay must be in [0, 1), got 1.0"),
        (lambda: hw.SleepGate(margin=-1.0), "margin must be finite and not negative, got -1.0"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
