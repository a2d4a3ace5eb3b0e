"""Ablation and pruning by steps on models in which every head's worth is known."""

import datetime

import headwise as hw
import numpy as np
import pytest
import torch
from headwise.nn.intervention import contents_of
from support.planted import Planted, logistic, outputs, squared
from torch import nn

WEIGHTS = ([1.0, -0.5, 0.0, 2.0], [0.3, 0.0, 1.0, -1.0])


def names(model):
    return list(hw.attention_layers(model))


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64)
    return x, x[:, 0] + x[:, 3]


def split(data, *sizes):
    return list(zip(*(part.split(sizes) for part in data), strict=True))


def test_ablation_is_the_difference_without_each_head(data):
    model, (x, y) = Planted(*WEIGHTS), data
    found = hw.analysis.ablate_heads(model, split(data, 15, 25), squared, resamples=200)
    full = (outputs(WEIGHTS, x) - y).square()
    torch.testing.assert_close(found.losses, full)
    for layer, name in enumerate(names(model)):
        for head in range(4):
            difference = (outputs(WEIGHTS, x, {(layer, head)}) - y).square() - full
            torch.testing.assert_close(found.scores.values[name][head], difference.mean())
            assert found.low[name][head] <= difference.mean() <= found.high[name][head]
    idle = [(names(model)[0], 2), (names(model)[1], 1)]
    assert not set(idle) & set(found.significant())
    assert all(found.p_value[name][head] == 1 for name, head in idle)
    assert found.scores.metric == "ablation"


def test_all_but_one_keeps_one_head_of_a_layer(data):
    model, (x, y) = Planted(*WEIGHTS), data
    found = hw.analysis.keep_one_head(model, [data], squared, resamples=50)
    full = (outputs(WEIGHTS, x) - y).square()
    for layer, name in enumerate(names(model)):
        for head in range(4):
            others = {(layer, other) for other in range(4) if other != head}
            only = (outputs(WEIGHTS, x, others) - y).square()
            expected = (full - only).mean()
            torch.testing.assert_close(found.scores.values[name][head], expected)
    assert found.scores.metric == "all-but-one"


def test_a_damaging_head_is_found():
    # y = x0 + x3; head 1 of the only layer adds noise.
    model = Planted([1.0, 1.0, 0.0, 1.0])
    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64)
    found = hw.analysis.ablate_heads(model, [(x, x[:, 0] + x[:, 3])], squared)
    scores = found.scores.values[names(model)[0]]
    assert scores[1] < 0 and scores[0] > 0 and scores[3] > 0
    assert found.significant() == [(names(model)[0], head) for head in (0, 1, 3)]


def test_gates_of_the_model_stay_in_force(data):
    model, (x, y) = Planted(*WEIGHTS), data
    model.layers[0].set_gate(hw.FixedGate(scale=[0.5, 1.0, 1.0, 0.0]))
    effective = ([0.5, -0.5, 0.0, 0.0], WEIGHTS[1])
    model.train()
    gates = [layer.gate for layer in model.layers]
    found = hw.analysis.ablate_heads(model, [data], squared, resamples=20)
    assert [layer.gate for layer in model.layers] == gates and model.training
    assert not model.layers[0].gate._forward_hooks
    full = (outputs(effective, x) - y).square()
    torch.testing.assert_close(found.losses, full)
    without = (outputs(effective, x, {(0, 0)}) - y).square()
    torch.testing.assert_close(found.scores.values[names(model)[0]][0], (without - full).mean())
    assert found.scores.values[names(model)[0]][3] == 0


class Interrupt(Exception):
    pass


def interrupted(loss, calls):
    """``loss`` for this many calls, then an interruption."""
    left = [calls]

    def limited(model, batch):
        if left[0] == 0:
            raise Interrupt
        left[0] -= 1
        return loss(model, batch)

    return limited


def test_an_interrupted_ablation_goes_on(data, tmp_path):
    model, path = Planted(*WEIGHTS), tmp_path / "ablation.jsonl"
    expected = hw.analysis.ablate_heads(model, [data], squared)
    with pytest.raises(Interrupt):
        hw.analysis.ablate_heads(model, [data], interrupted(squared, 4), journal=path)
    with open(path, "a") as file:
        file.write('["layers.0/3", [0.1, 0.')  # cut short
    # The whole model once more, and the five heads that are left.
    found = hw.analysis.ablate_heads(model, [data], interrupted(squared, 6), journal=path)
    for name, values in expected.scores.values.items():
        torch.testing.assert_close(found.scores.values[name], values)
        assert torch.equal(found.p_value[name], expected.p_value[name])
    with pytest.raises(ValueError, match="is of ablation with data='.*', not '"):
        hw.analysis.ablate_heads(model, [(data[0], data[1] + 1)], squared, journal=path)
    with pytest.raises(ValueError, match="is of another loss: the whole model's losses"):
        hw.analysis.ablate_heads(model, [data], lambda m, b: squared(m, b) + 1, journal=path)
    with pytest.raises(ValueError, match="is of work 'ablation', not 'all-but-one'"):
        hw.analysis.keep_one_head(model, [data], squared, journal=path)
    with pytest.raises(ValueError, match="is of ablation with model="):
        hw.analysis.ablate_heads(Planted(*WEIGHTS[::-1]), [data], squared, journal=path)
    path.write_text("not a journal\n")
    with pytest.raises(ValueError, match="is not a file of unfinished work: give another one"):
        hw.analysis.ablate_heads(model, [data], squared, journal=path)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Opaque:
    def __reduce__(self):
        raise TypeError("not to be pickled")


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (np.arange(3), np.arange(3), np.arange(3) + 1),
        (np.zeros(2), np.zeros(2), np.zeros(2, dtype=np.float32)),
        (Slotted(torch.ones(2)), Slotted(torch.ones(2)), Slotted(torch.zeros(2))),
        ({"a", "b"}, {"b", "a"}, {"a", "c"}),
        (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2), datetime.date(2026, 1, 3)),
        ([1, [2]], [1, [2]], [[1], 2]),
        ({"ids": 1, "mask": None}, {"ids": 1, "mask": None}, {"ids": None, "mask": 1}),
    ],
)
def test_other_data_is_told_apart(one, same, other):
    model = Planted(*WEIGHTS)
    first, again, changed = (contents_of(model, [value]) for value in (one, same, other))
    assert first == again and first != changed


def test_data_that_cannot_be_told_apart_has_no_journal(tmp_path):
    with pytest.raises(ValueError, match="a Opaque cannot be told from another"):
        hw.analysis.ablate_heads(Planted(*WEIGHTS), [Opaque()], squared, journal=tmp_path / "steps")
    assert not (tmp_path / "steps").exists()


def test_bad_input_is_named(data):
    model = Planted(*WEIGHTS)
    for ablate in (hw.analysis.ablate_heads, hw.analysis.keep_one_head):
        with pytest.raises(ValueError, match="batches must not be empty"):
            ablate(model, [], squared)
        with pytest.raises(ValueError, match="must return a finite loss, got NaN or infinity"):
            ablate(model, [data], lambda m, b: squared(m, b) / 0)
        with pytest.raises(ValueError, match=r"one loss per example \[B\], got shape \(\)"):
            ablate(model, [data], lambda m, b: squared(m, b).mean())
        with pytest.raises(ValueError, match="is zero for every head: the loss does not depend"):
            ablate(model, [data], lambda m, b: b[1].square())
        with pytest.raises(ValueError, match="resamples must be in 1"):
            ablate(model, [data], squared, resamples=0)


def redundant():
    """Heads 0 and 1 both carry group A, weakly needed one at a time; 2 and 3 carry group B."""
    model = Planted([2.0, 2.0, 1.0, 0.8])
    a = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    x = torch.cat([a.expand(8, 4), (1 - a).expand(8, 4)])
    return model, [(x, None)]


def kept(plan):
    return [entry.heads for entry in plan.layers]


def test_exact_pruning_keeps_one_of_two_redundant_heads():
    model, batches = redundant()
    options = dict(keep=0.5, step=0.25, absolute="per_example")
    exact = hw.pruning.pruning_path(model, batches, logistic, **options)
    once = hw.pruning.pruning_path(model, batches, logistic, exact=False, **options)
    # At first 0 and 1 matter least: sigma(-4) * 2 against sigma(-1.8) * 0.8.
    assert [kept(plan) for plan in exact] == [[[0, 2, 3]], [[0, 2]]]
    assert [kept(plan) for plan in once] == [[[0, 2, 3]], [[2, 3]]]
    about = {"keep": 0.5, "step": 0.25, "exact": True, "min_heads_per_layer": 0}
    assert exact[-1].metadata == about

    def loss(plan):
        return logistic(hw.prune(model, plan), batches[0]).mean()

    assert loss(exact[-1]) < loss(once[-1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)[:, 0]


def encoder_problem():
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 5, 16)

    def loss(model, batch):
        return (model(batch[0]) - batch[1][:, 0]).square().sum(1)

    return Encoder(), [(x, y)], loss


@pytest.mark.parametrize("metric", ["michel", "hies", "entropy", "attention_confidence"])
@pytest.mark.parametrize("exact", [True, False])
def test_paths_are_nested_down_to_the_target(metric, exact):
    model, batches, loss = encoder_problem()
    path = hw.pruning.pruning_path(
        model, batches, loss, keep=0.1, step=0.3, exact=exact, metric=metric
    )
    assert [plan.heads_kept for plan in path] == [8, 4, 1]
    heads = [{(e.name, h) for e in plan.layers for h in e.heads} for plan in path]
    assert heads[0] > heads[1] > heads[2]
    assert path[-1].metric == metric and not hw.attention_layers(model)
    small = hw.prune(hw.convert(model), path[-1])
    assert sum(layer.num_heads for layer in hw.attention_layers(small).values()) == 1


def test_every_layer_keeps_what_it_must():
    model, batches, loss = encoder_problem()
    path = hw.pruning.pruning_path(model, batches, loss, keep=0.25, step=0.2, min_heads_per_layer=1)
    assert [plan.heads_kept for plan in path] == [10, 8, 6, 4, 3]
    assert [len(heads) for heads in kept(path[-1])] == [1, 1, 1]
    assert [kept(plan) for plan in hw.pruning.pruning_path(model, batches, loss, keep=1.0)] == [
        [[0, 1, 2, 3]] * 3
    ]


def test_an_interrupted_path_goes_on(tmp_path):
    model, batches, loss = encoder_problem()
    path = tmp_path / "path.jsonl"
    expected = hw.pruning.pruning_path(model, batches, loss, keep=0.3, step=0.2)
    with pytest.raises(Interrupt):
        hw.pruning.pruning_path(model, batches, interrupted(loss, 3), 0.3, step=0.2, journal=path)
    found = hw.pruning.pruning_path(
        model, batches, interrupted(loss, 3), 0.3, step=0.2, journal=path
    )
    assert found == expected
    with pytest.raises(ValueError, match="with step=0.2, not 0.1: remove it or give another file"):
        hw.pruning.pruning_path(model, batches, loss, 0.3, step=0.1, journal=path)
    with pytest.raises(ValueError, match="is of another loss: of the first batch it wa"):
        hw.pruning.pruning_path(
            model, batches, lambda m, b: 3 * loss(m, b), 0.3, step=0.2, journal=path
        )


def test_path_refusals():
    model, batches, loss = encoder_problem()
    with pytest.raises(ValueError, match=r"step must be in \(0, 1\], got 0"):
        hw.pruning.pruning_path(model, batches, loss, step=0.0)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 1.5"):
        hw.pruning.pruning_path(model, batches, loss, 1.5)
    with pytest.raises(ValueError, match="metric must be one of michel, .*, got 'magic'"):
        hw.pruning.pruning_path(model, batches, loss, metric="magic")
    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.pruning.pruning_path(model, [], loss)
    with pytest.raises(ValueError, match="=3 asks for 9 heads, more than keep=0.5 leaves"):
        hw.pruning.pruning_path(model, batches, loss, 0.5, min_heads_per_layer=3)
    with pytest.raises(ValueError, match="model must have no gates, got a RandomGate in layer"):
        hw.pruning.pruning_path(hw.convert(Encoder(), hw.RandomGate()), batches, loss)


@pytest.mark.parametrize("kept_weight", ["gate", "one"])
def test_trained_static_gates_are_compacted_in_one_call(kept_weight):
    model, batches, _ = encoder_problem()
    model = hw.convert(model, hw.HardConcreteGate(kept_weight=kept_weight)).eval()
    with torch.no_grad():
        for layer in hw.attention_layers(model).values():
            layer.gate.log_alpha.copy_(torch.tensor([-4.0, 0.3, 4.0, -0.2]))
    small = hw.prune(model)
    torch.testing.assert_close(small(batches[0][0]), model(batches[0][0]))
    assert all(layer.num_heads < 4 and layer.gate is None for layer in
               hw.attention_layers(small).values())  # fmt: skip
    plan = hw.plan_from_gates(model)
    # Voita et al. 2019: evaluation takes sigmoid(log_alpha), stretched to [-0.1, 1.1], clipped.
    value = [max(0, min(1, 1.2 / (1 + 2.718281828**-a) - 0.1)) for a in (-4.0, 0.3, 4.0, -0.2)]
    if kept_weight == "gate":
        assert plan.layers[0].heads == [1, 2, 3]
        assert plan.layers[0].scale == pytest.approx(value[1:], abs=1e-6)
    else:
        assert set(plan.layers[0].scale) == {1.0}
    assert hw.HeadPlan.from_json(plan.to_json()) == plan


def test_layers_without_heads_are_part_of_every_analysis(tmp_path):
    model, batches, loss = encoder_problem()
    model = hw.convert(model)
    names = list(hw.attention_layers(model))
    keep = [hw.pruning.LayerPlan(names[0], 4, [1, 3]), hw.pruning.LayerPlan(names[1], 4, [])]
    small = hw.prune(model, hw.HeadPlan(keep))
    sizes = [2, 0, 4]

    def logits(model, batch):
        return model(batch[0])

    found = [
        hw.analysis.ablate_heads(small, batches, loss).scores,
        hw.analysis.keep_one_head(small, batches, loss).scores,
        hw.analysis.lrp_scores(small, batches, logits).scores,
        hw.analysis.causal_heads(small, batches, loss, steps=3, journal=tmp_path / "gates").scores,
    ]
    for scores in found:
        assert [len(values) for values in scores.values.values()] == sizes
        assert hw.plan(scores, 0.5).heads_kept == 3
    assert len(hw.analysis.head_similarity(small, batches, logits).heads) == 6
    assert len(hw.analysis.head_interactions(small, batches, loss).pairs) == 15
    policy = hw.analysis.ConfidencePolicy(
        small, (0.5, 1.0), ranking=found[0], forward_fn=lambda m, b: m(b[0]), threshold=2.0
    )
    assert policy.predict((batches[0][0],)).total_heads.tolist() == [9] * 6


def test_gates_that_see_the_input_are_no_plan():
    model = hw.convert(Encoder(), hw.HardConcreteGate(input_dependent=True))
    with pytest.raises(ValueError, match="has a HardConcreteGate, whose choice depends on the in"):
        hw.plan_from_gates(model)
    with pytest.raises(ValueError, match="has a HardConcreteGate, whose choice depends on the in"):
        hw.prune(model)
    with pytest.raises(ValueError, match="model must have gates to make a plan from, got none"):
        hw.prune(hw.convert(Encoder()))
