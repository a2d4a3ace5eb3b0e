"""Headroom: what plans by the input win over one plan, on data where that is known."""

import headwise as hw
import pytest
import torch
from torch import nn


class TwoTasks(nn.Module):
    """An input's first feature is its task, and each task needs a head that the other does not.

    Sequences have one token, so attention passes values on: head h writes feature h of the input.
    """

    def __init__(self):
        super().__init__()
        self.first, self.layer = (
            hw.MultiheadAttention(4, 4, batch_first=True).double() for _ in range(2)
        )
        with torch.no_grad():
            for layer in (self.first, self.layer):
                layer.in_proj_weight.zero_()
                layer.in_proj_bias.zero_()
                layer.in_proj_weight[8:].copy_(torch.eye(4))
                layer.out_proj.weight.copy_(torch.eye(4))
            self.first.out_proj.weight.mul_(1e-3)

    def forward(self, x):  # [B, 1, 4] -> [B]: feature 1 in the first task, 2 in the second
        x = x + self.first(x, x, x, need_weights=False)[0]
        y = self.layer(x, x, x, need_weights=False)[0][:, 0]
        return torch.where(x[:, 0, 0] > 0, y[:, 1], y[:, 2])


def data(count, seed, tasks=(0, 1)):
    generator = torch.Generator().manual_seed(seed)
    found, kinds = [], []
    for _ in range(count):
        x = torch.randn(16, 1, 4, generator=generator).double()
        kind = torch.tensor(tasks)[torch.randint(len(tasks), (16,), generator=generator)]
        x[:, 0, 0] = torch.where(kind == 0, 5.0, -5.0)
        found.append(x)
        kinds.append(kind)
    return found, torch.cat(kinds)


def score(model, batches):
    """How much each head of the second layer matters to the tasks that occur."""
    x = torch.cat(batches)
    share = (x[:, 0, 0] > 0).double().mean()
    values = torch.tensor([0.0, share, 1.0 - share, 0.0])
    return hw.HeadScores("need", {"first": torch.full((4,), -1.0), "layer": values})


def value(model, x):
    """1 if the sign of the answer is right."""
    wanted = torch.where(x[:, 0, 0] > 0, x[:, 0, 1], x[:, 0, 2])
    return ((model(x) > 0) == (wanted > 0)).double()


def test_choosing_wins_where_tasks_need_different_heads():
    calibration, kinds = data(8, 0)
    held_out, held_kinds = data(8, 1)
    found = hw.headroom(
        TwoTasks(), calibration, held_out, score, value, keep=(1 / 8,), clusters=kinds,
        held_out_clusters=held_kinds, at=0,
    )  # fmt: skip
    (row,) = found.rows
    assert found.dense == 1.0 and found.plans == 2 and found.inputs == 128
    # One head for all: half of the inputs are guessed. A head for each task: none.
    assert 0.65 < row.static < 0.85 and row.routed == row.ceiling == 1.0
    assert row.lost.mean == pytest.approx(1.0 - row.static)
    assert row.won.low > 0.1 and row.won.low < row.won.mean < row.won.high
    assert row.swapped < 0.85 and row.own.low > 0.1
    assert found.worth_trying == [1 / 8]
    *lines, verdict = found.sentences()
    assert (
        len(lines) == 1 and verdict == "Choosing by the input is worth trying at 12% of the heads."
    )
    assert found.to_dict()["rows"][0]["won"]["mean"] == row.won.mean


def test_choosing_wins_nothing_on_one_task():
    (calibration, _), (held_out, _) = data(8, 0, tasks=(0,)), data(8, 1, tasks=(0,))
    for x in (*calibration, *held_out):
        x[:, 0, 0] = x[:, 0, 0] + torch.arange(16) / 16  # clusters of the same task
    found = hw.headroom(
        TwoTasks(), calibration, held_out, score, value, keep=(0.5, 1 / 8), plans=2, at=0
    )
    assert [row.keep for row in found.rows] == [0.5, 1 / 8]
    assert all(row.static == row.routed == 1.0 for row in found.rows)
    assert found.worth_trying == []
    assert found.sentences()[-1].startswith("Choosing by the input is not worth trying")


def test_headroom_says_what_is_wrong():
    (calibration, kinds), (held_out, _) = data(2, 0), data(1, 1)
    model = TwoTasks()
    with pytest.raises(ValueError, match="held_out must not be empty"):
        hw.headroom(model, calibration, [], score, value)
    with pytest.raises(ValueError, match=r"value_fn must return one value per example \[B\]"):
        hw.headroom(model, calibration, held_out, score, lambda m, x: m(x).mean())
    with pytest.raises(ValueError, match="value_fn must return a finite value"):
        hw.headroom(model, calibration, held_out, score, lambda m, x: m(x) / 0)
    with pytest.raises(ValueError, match=r"held_out_clusters must be numbers in 0\.\.1"):
        hw.headroom(
            model, calibration, held_out, score, value, keep=(0.5,), clusters=kinds, at=0,
            held_out_clusters=[5] * 16,
        )  # fmt: skip
