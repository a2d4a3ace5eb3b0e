"""Pruning without retraining (Kwon et al. 2022): parts against plain references, and a whole."""

import copy
import itertools
import json
from dataclasses import replace

import headwise as hw
import numpy as np
import pytest
import torch
from headwise import _C
from headwise.pruning.structured.description import structure as structure_of
from headwise.pruning.structured.masks import StructureMasks, masks_of
from headwise.pruning.structured.tuning import _read_tokens, _sensitivity, tune
from support.architectures import EMBED, HEADS, _encoder, bert, bert_inputs
from torch import nn
from torch.nn import functional as F


def scores_of(generator, layers, units):
    return [generator.exponential(size=units).tolist() for _ in range(layers)]


def best_of_all(heads, neurons, head_cost, neuron_cost, limit):
    """The best sum of scores under the limit, by trying every set of heads and of neurons."""
    every = [sum(heads, []), sum(neurons, [])]
    best = 0.0
    for some in itertools.product([0, 1], repeat=len(every[0])):
        left = limit - head_cost * sum(some)
        if left < -1e-9:
            continue
        count = min(len(every[1]), int(left / neuron_cost + 1e-9))
        chosen = (
            max(sum(part) for part in itertools.combinations(every[1], count)) if count else 0.0
        )
        best = max(best, float(np.dot(some, every[0])) + chosen)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_mac_search_finds_the_best(seed):
    generator = np.random.default_rng(seed)
    heads, neurons = scores_of(generator, 2, 3), scores_of(generator, 2, 4)
    head_cost, neuron_cost = float(generator.uniform(1, 4)), float(generator.uniform(0.3, 1.5))
    whole = 6 * head_cost + 8 * neuron_cost
    last = -1.0
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        limit = share * whole
        found = _C.search_macs(heads, neurons, head_cost, neuron_cost, limit)
        assert found.cost <= limit * (1 + 1e-9)
        spent = head_cost * sum(map(len, found.heads)) + neuron_cost * sum(map(len, found.neurons))
        assert found.cost == pytest.approx(spent)
        expected = best_of_all(heads, neurons, head_cost, neuron_cost, limit)
        assert found.score == pytest.approx(expected)
        kept = sum(heads[i][h] for i, units in enumerate(found.heads) for h in units)
        kept += sum(neurons[i][j] for i, units in enumerate(found.neurons) for j in units)
        assert kept == pytest.approx(found.score)
        assert found.score >= last
        last = found.score
    assert sum(map(len, found.heads)) == 6 and sum(map(len, found.neurons)) == 8


def test_mac_search_breaks_ties_by_layer_and_unit_and_keeps_no_more_than_half_to_the_last():
    found = _C.search_macs([[1.0, 1.0], [1.0, 1.0]], [], 1.0, 1.0, 2.0)
    assert found.heads == [[0, 1], []]
    found = _C.search_macs([[1.0] * 12] * 6, [[0.1] * 96] * 6, 0.1, 0.01, 0.5 * (7.2 + 5.76))
    assert found.cost <= 0.5 * (7.2 + 5.76) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: _C.search_macs([[0.0, 0.0]], [[0.0]], 1, 1, 1), "scores must not all be 0: the l"),
        (
            lambda: _C.search_macs([[float("nan")]], [], 1, 1, 1),
            "scores of heads of layer 0 must b",
        ),
        (lambda: _C.search_macs([[1.0]], [], 0, 1, 1), "head_cost and neuron_cost must be positiv"),
        (lambda: _C.fit_latency([1], [1.0]), "units and seconds must have the same length, at l"),
        (lambda: _C.fit_latency([1, 2], [1.0, 0.0]), "seconds must be positive and finite, got 0"),
        (lambda: _C.fit_latency([2, 2], [1.0, 1.0]), "units must be ascending, different and not"),
        (lambda: _C.rearrange(torch.ones(2, 3), [3]), "kept must be between 0 and 2, got 3"),
    ],
)
def test_parts_refuse_nonsense(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)


def test_latency_fit_is_constant_then_linear():
    units = list(range(1, 13))
    times = [2.0 + 0.5 * max(u - 4, 0) for u in units]
    fit = _C.fit_latency(units, times)
    assert (fit.base, fit.threshold, fit.slope) == (pytest.approx(2.0), 4, pytest.approx(0.5))
    assert fit.seconds(10) == pytest.approx(5.0)
    falling = _C.fit_latency(units, [3.0 - 0.1 * u for u in units])
    assert falling.slope == 0.0
    generator = np.random.default_rng(0)
    noisy = [t + generator.normal() * 0.2 for t in times]
    fit = _C.fit_latency(units, noisy)
    error = sum((fit.seconds(u) - t) ** 2 for u, t in zip(units, noisy, strict=True))
    for threshold in units:  # a plain reference: numpy's least squares at each threshold
        x = np.maximum(np.array(units) - threshold, 0)
        design = np.stack([np.ones(12), x], 1)[:, : 2 if x.any() else 1]
        solution = np.linalg.lstsq(design, np.array(noisy), rcond=None)[0]
        assert error <= np.square(design @ solution - noisy).sum() + 1e-9


def ladders(scores, threshold):
    """Of each number of dropped layers, the scores by the number of units beyond the threshold."""
    ranked = [sorted(layer, reverse=True) for layer in scores]
    ranked.sort(key=lambda layer: -sum(layer[:threshold]))
    found = []
    for drops in range(len(ranked)):
        kept = ranked[: len(ranked) - drops]
        first = sum(sum(layer[:threshold]) for layer in kept)
        rest = sorted((s for layer in kept for s in layer[threshold:]), reverse=True)
        found.append([first + sum(rest[:n]) for n in range(len(rest) + 1)])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_latency_search_finds_the_best(seed):
    """The search of the released code: layers of least importance are dropped whole."""
    generator = np.random.default_rng(seed)
    heads, neurons = scores_of(generator, 3, 4), scores_of(generator, 3, 4)
    head_time, neuron_time = _C.LatencyFit(1.0, 2, 0.4), _C.LatencyFit(0.5, 1, 0.3)
    whole = 3 * (head_time.seconds(4) + neuron_time.seconds(4))
    last = -1.0
    for limit in (1.5, 2.0, 2.9, 3.5, 4.5, 6.0, whole):
        found = _C.search_latency(heads, neurons, head_time, neuron_time, limit)
        spent = sum(head_time.seconds(len(units)) for units in found.heads)
        spent += sum(neuron_time.seconds(len(units)) for units in found.neurons)
        assert spent == pytest.approx(found.cost) and found.cost <= limit * (1 + 1e-9)
        best = max(
            a + b
            for dropped, ladder in enumerate(ladders(heads, 2))
            for skipped, other in enumerate(ladders(neurons, 1))
            for (n, a), (m, b) in itertools.product(enumerate(ladder), enumerate(other))
            if 1.0 * (3 - dropped) + 0.5 * (3 - skipped) + 0.4 * n + 0.3 * m <= limit + 1e-9
        )
        assert found.score == pytest.approx(best) and found.score >= last
        kept = sum(heads[i][h] for i, units in enumerate(found.heads) for h in units)
        kept += sum(neurons[i][j] for i, units in enumerate(found.neurons) for j in units)
        assert kept == pytest.approx(found.score)
        last = found.score
    assert found.heads == found.neurons == [[0, 1, 2, 3]] * 3
    with pytest.raises(
        ValueError, match="limit must be at least 1.5 seconds, what one layer of ea"
    ):
        _C.search_latency(heads, neurons, head_time, neuron_time, 1.4)
    flat = _C.LatencyFit(1.0, 1, 0.0)  # beyond the threshold nothing costs
    assert _C.search_latency(heads, neurons, flat, flat, 6.0).heads == [[0, 1, 2, 3]] * 3
    assert flat.seconds(0) == 0.0 and flat.seconds(1) == 1.0


def test_a_layer_is_dropped_where_that_saves_more_than_its_heads_are_worth():
    """A block costs 10 whatever it has: thinning it saves nothing, dropping it does."""
    heads, neurons = [[5.0, 4.0], [3.0, 0.1], [0.2, 0.1]], [[9.0, 8.0], [1.0, 1.0], [7.0, 6.0]]
    time = _C.LatencyFit(10.0, 2, 1.0)
    found = _C.search_latency(heads, neurons, time, time, 40.0)
    assert found.heads == [[0, 1], [0, 1], []] and found.neurons == [[0, 1], [], [0, 1]]
    assert found.cost == 40.0
    assert _C.search_latency(heads, [], time, time, 10.0).heads == [[0, 1], [], []]


def greedy(gradients, kept):
    """Algorithm 2 as the paper states it, on sets."""
    units = gradients.shape[1]
    going = [unit for unit in range(units) if unit not in kept]

    def norm(some):
        return np.square(gradients[:, some].sum(1)).sum()

    for unit in sorted(kept, key=lambda u: (np.square(gradients[:, u]).sum(), u)):
        tried = [[u for u in [*going, unit] if u != out] for out in [unit, *going]]
        going = min(tried, key=norm)
    return [unit for unit in range(units) if unit not in going], norm(going)


@pytest.mark.parametrize("seed", range(6))
def test_rearrangement(seed):
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(5, 9))
    order = np.square(gradients).sum(0).argsort()
    kept = sorted(order[4:].tolist())
    found = _C.rearrange(torch.from_numpy(gradients), kept)
    expected, norm = greedy(gradients, kept)
    assert found == expected and len(found) == len(kept)
    assert norm <= np.square(gradients[:, order[:4]].sum(1)).sum() + 1e-12
    for everything in ([], list(range(9))):
        assert _C.rearrange(torch.from_numpy(gradients), everything) == everything


def test_rearrangement_lets_opposites_go_together():
    # Units 1 and 2 nearly undo each other, though each matters more than unit 0.
    gradients = torch.tensor([[1.0, 1.1, -1.2]])
    assert _C.rearrange(gradients, [2]) == [0]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_scales_are_the_ridge_solution(group, damp):
    torch.manual_seed(group)
    tokens, width, units = 40, 7, 4
    weight = torch.randn(width, units * group)
    inputs, residual = torch.randn(tokens, units * group), torch.randn(tokens, width)
    solver = _C.ScaleSolver(weight, group)
    for part in (slice(0, 13), slice(13, 40)):
        solver.add(inputs[part], residual[part])
    # The design matrix written out: what each unit adds to every entry of the residual stream.
    columns = []
    for unit in range(units):
        own = slice(unit * group, (unit + 1) * group)
        columns.append((inputs[:, own] @ weight[:, own].T).flatten().double().numpy())
    design, target = np.stack(columns, 1), residual.flatten().double().numpy()
    ridge = np.sqrt(damp * np.square(design).sum(0).mean()) * np.eye(units)
    expected = np.linalg.lstsq(
        np.vstack([design, ridge]), np.concatenate([target, np.zeros(units)]), rcond=None
    )[0]
    scale = solver.solve(damp)
    np.testing.assert_allclose(scale, 1 + expected, rtol=1e-4, atol=1e-5)
    error = np.square(target - design @ expected).sum()
    assert solver.error(scale) == pytest.approx(error, rel=1e-4)
    assert solver.error([1.0] * units) == pytest.approx(np.square(target).sum(), rel=1e-6)
    with pytest.raises(ValueError, match="scale must have 4 units, got 3"):
        solver.error([1.0] * 3)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("intercept", [False, True])
def test_scales_of_the_released_code(group, intercept):
    """1 + x with min |N x - (b - N 1)|^2 + |x|^2, N = A'A and b = A'y, as its LSMR is called."""
    torch.manual_seed(group)
    tokens, width, units = 40, 7, 4
    weight = torch.randn(width, units * group, dtype=torch.float64)
    inputs = torch.randn(tokens, units * group, dtype=torch.float64)
    teacher = torch.randn(tokens, width, dtype=torch.float64)
    columns = [
        (
            inputs[:, u * group : (u + 1) * group] @ weight[:, u * group : (u + 1) * group].T
        ).flatten()
        for u in range(units)
    ]
    student = sum(columns)
    design = torch.stack(columns + [torch.ones_like(student)] * intercept, 1)
    normal, right = design.T @ design, design.T @ teacher.flatten()
    target = right - normal.sum(1)
    stacked = torch.cat([normal, torch.eye(len(normal), dtype=torch.float64)])
    expected = 1 + torch.linalg.lstsq(stacked, torch.cat([target, 0 * target])[:, None])[0][:, 0]
    solver = _C.ScaleSolver(weight, group)
    residual = teacher - student.view(tokens, width)
    solver.add(inputs[:13], residual[:13])
    solver.add(inputs[13:], residual[13:])
    assert solver.solve_released(intercept) == pytest.approx(expected[:units].tolist(), rel=1e-8)


def test_the_ridge_has_no_unit():
    """More tokens of the same kind, or a stream of another size, leave the scales as they are."""
    torch.manual_seed(0)
    weight, inputs, residual = torch.randn(5, 3), torch.randn(20, 3), torch.randn(20, 5)
    scales = []
    for size, times in ((1.0, 1), (1.0, 7), (30.0, 1)):
        solver = _C.ScaleSolver(weight, 1)
        for _ in range(times):
            solver.add(size * inputs, size * residual)
        scales.append(solver.solve(0.1))
    assert scales[1] == pytest.approx(scales[0], rel=1e-4)
    assert scales[2] == pytest.approx(scales[0], rel=1e-4)


def test_equations_without_a_solution():
    solver = _C.ScaleSolver(torch.ones(2, 2), 1)
    solver.add(torch.ones(3, 2), torch.ones(3, 2))  # two units that do the same
    assert solver.solve(0.0) is None
    assert solver.solve(1.0)[0] == pytest.approx(solver.solve(1.0)[1])
    solver.add(torch.full((1, 2), float("nan")), torch.ones(1, 2))
    assert solver.solve(1.0) is None


def test_fisher_information_is_the_sum_of_squared_mask_gradients():
    accumulator = _C.FisherAccumulator()
    rows = torch.randn(4, 3)
    for row in rows:
        accumulator.add("a", row)
    assert torch.equal(accumulator.gradients("a"), rows.double())
    assert accumulator.scores("a") == pytest.approx(rows.double().square().sum(0).tolist())
    with pytest.raises(ValueError, match="gradient of layer 'a' must be finite, got NaN"):
        accumulator.add("a", torch.tensor([1.0, float("nan"), 0.0]))
    with pytest.raises(ValueError, match="gradient of layer 'a' must have 3 units, got 2"):
        accumulator.add("a", torch.ones(2))
    with pytest.raises(IndexError, match="nothing was added for layer 'b'"):
        accumulator.scores("b")


# --- the whole ---


def test_fisher_scores_of_a_model():
    model = planted(hw.convert(classifier()).double())
    scores = hw.pruning.fisher_scores(model, task(), loss_fn)
    heads, neurons = hw.pruning.structure(model).heads, hw.pruning.structure(model).neurons
    assert {name: len(values) for name, values in scores.items()} == {**heads, **neurons}
    first = scores[next(iter(heads))]
    assert first[1:3].max() < 1e-4 * min(first[0], first[3])
    second = scores[list(neurons)[1]]
    assert second[::2].max() < 1e-2 * second[1::2].max()
    # By hand: the squared derivative of each batch's mean loss by a head's factor.
    name = next(iter(heads))
    layer = hw.attention_layers(model)[name]
    size, weight = layer.head_dim, layer.out_proj.weight.detach().clone()
    expected = 0.0
    for batch in task():
        losses = []
        for factor in (1.001, 0.999):
            with torch.no_grad():
                layer.out_proj.weight[:, :size] = factor * weight[:, :size]
                losses.append(loss_fn(model, batch).mean())
        expected += ((losses[0] - losses[1]) / 0.002) ** 2
    assert first[0].item() == pytest.approx(expected.item(), rel=0.02)
    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.pruning.fisher_scores(model, [], loss_fn)
    with pytest.raises(ValueError, match="scores must not all be 0: the loss does not depend on t"):
        hw.pruning.fisher_scores(model, task(1), lambda m, b: loss_fn(m, b) * 0)


def task(count=6, classes=3):
    torch.manual_seed(1)
    return [{**bert_inputs(), "labels": torch.randint(0, classes, (3,))} for _ in range(count)]


def loss_fn(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def classifier(**kwargs):
    torch.manual_seed(0)
    return bert("BertForSequenceClassification", num_labels=3, **kwargs)


@pytest.mark.parametrize("macs", [0.2, 0.5, 0.8, 1.0])
def test_the_limit_holds_and_the_plan_is_the_model(macs):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    result = hw.pruning.kwon_prune(model, task(), loss_fn, macs=macs)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.report["macs"] <= macs * (1 + 1e-6)
    converted = hw.convert(copy.deepcopy(model))
    tokens = result.report["tokens"]
    assert tokens == pytest.approx(14 / 3)  # of lengths 7, 2 and 5
    share = hw.pruning.structure(result.model).macs(tokens) / hw.pruning.structure(converted).macs(
        tokens
    )
    assert result.report["macs"] == pytest.approx(share)
    batch = task(1)[0]
    masked = hw.mask(copy.deepcopy(converted), result.plan)
    with torch.no_grad():
        torch.testing.assert_close(loss_fn(result.model, batch), loss_fn(masked, batch))
        if macs == 1.0:
            torch.testing.assert_close(loss_fn(result.model, batch), loss_fn(converted, batch))
    assert hw.pruning.StructurePlan.from_json(result.plan.to_json()) == result.plan
    assert all(p.requires_grad for p in result.model.parameters())


def squared_error(model, dense, batches):
    """Of the logits."""
    with torch.no_grad():
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        return sum((model(**b).logits - dense(**b).logits).square().sum() for b in inputs).item()


def near(dense):
    """A loss that is 0 for what computes the same as ``dense``."""

    def loss(model, batch):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            wanted = dense(**inputs).logits
        return (model(**inputs).logits - wanted).square().sum(1)

    return loss


def test_tuning_makes_up_for_what_went():
    """Heads 0 and 1 do the same, and so do neurons 0 and 1: one of two, doubled, is both."""
    model = hw.convert(classifier())
    size = EMBED // HEADS
    for layer in hw.attention_layers(model).values():
        with torch.no_grad():
            for part in layer.in_proj_weight.chunk(3):
                part[size : 2 * size] = part[:size]
            for part in layer.in_proj_bias.chunk(3):
                part[size : 2 * size] = part[:size]
            layer.out_proj.weight[:, size : 2 * size] = layer.out_proj.weight[:, :size]
    for network in hw.pruning.structure(model).ffn.values():
        with torch.no_grad():
            network.first.weight[1], network.first.bias[1] = (
                network.first.weight[0],
                network.first.bias[0],
            )
            network.second.weight[:, 1] = network.second.weight[:, 0]
    plain = hw.mask(
        copy.deepcopy(model),
        hw.pruning.StructurePlan(
            hw.HeadPlan(
                [hw.pruning.LayerPlan(n, 4, [0, 2, 3]) for n in hw.attention_layers(model)]
            ),
            [
                hw.pruning.FfnPlan(n, 32, [0, *range(2, 32)])
                for n in hw.pruning.structure(model).ffn
            ],
        ),
    )
    batches = task(16)
    masks, whole = masks_of(plain), StructureMasks()
    whole.heads = {name: torch.ones(4) for name in masks.heads}
    whole.neurons = {name: torch.ones(32) for name in masks.neurons}
    untuned = squared_error(plain, model, batches[12:])
    units = [*masks.heads, *masks.neurons]
    with torch.no_grad():
        tuned = tune(
            plain, structure_of(plain), masks, batches[:12], near(model), whole, units=units,
            damp=1e-9,
        )  # fmt: skip
    assert tuned.step == 1.0 and tuned.loss[1] < 1e-4 * tuned.loss[0]
    assert [block["error_left"] < 1e-3 for block in tuned.blocks] == [True] * 4
    assert squared_error(plain, model, batches[12:]) < 1e-4 * untuned  # batches it never saw
    for mask in (*masks.heads.values(), *masks.neurons.values()):
        assert mask[0].item() == pytest.approx(2.0, abs=0.01) and mask[1] == 0
        torch.testing.assert_close(mask[2:], torch.ones_like(mask[2:]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("macs", [0.3, 0.6])
def test_tuning_is_never_worse_on_what_is_held_out(macs):
    model, batches = classifier(), task(12)
    plain = hw.pruning.kwon_prune(model, batches, loss_fn, macs=macs, tune=False)
    tuned = hw.pruning.kwon_prune(model, batches, loss_fn, macs=macs)
    assert all(s == 1.0 for entry in plain.plan.heads.layers for s in entry.scale)
    with torch.no_grad():
        before, after = (
            torch.cat([loss_fn(found.model, batches[i]) for i in (3, 7, 11)]).mean().item()
            for found in (plain, tuned)
        )
    report = tuned.report
    assert report["tuning_loss"][0] == pytest.approx(before, rel=1e-4)
    assert after <= before * (1 + 1e-6)
    assert after == pytest.approx(report["tuning_loss"][1], rel=1e-4)
    assert (report["tuning_step"] > 0) == (report["tuning_loss"][1] < report["tuning_loss"][0])
    for block in report["tuning"]:
        assert block["error_left"] <= 1.0
        assert (block["damp"] is None) == (block["error_left"] == 1.0)
    limited = hw.pruning.kwon_prune(model, batches, loss_fn, macs=macs, max_scale=0.01)
    assert limited.report["tuned_blocks"] == 0 and limited.report["tuning_step"] == 0
    assert all(s == 1.0 for entry in limited.plan.heads.layers for s in entry.scale)


@pytest.mark.parametrize("norm_first", [False, True])
def test_sensitivity_is_the_root_mean_square_of_the_gradient(norm_first):
    torch.manual_seed(0)
    model = hw.convert(_encoder(norm_first=norm_first)).double()
    model.requires_grad_(False)
    x, c = torch.randn(2, 5, EMBED).double(), torch.randn(EMBED).double()
    found = hw.pruning.structure(model)
    last = found.layers[-1]
    if norm_first:
        model.norm = None
        expected = c.abs() / c.square().mean().sqrt()
    else:  # through the last norm, by differences
        norm, seen = last.module.norm2, []
        handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(x)
        handle.remove()
        (stream,) = seen
        columns = []
        for d in range(EMBED):
            step = torch.zeros(EMBED).double()
            step[d] = 1e-6
            change = (norm(stream + step) - norm(stream - step)) @ c / 2e-6  # [B, L]
            columns.append(change.square().sum())
        squares = torch.stack(columns)
        expected = (squares / squares.mean()).sqrt()
    measured = _sensitivity(model, found, [x], lambda m, x: (m(x) @ c).sum(1))
    assert set(measured) == {layer.name for layer in found.layers}
    torch.testing.assert_close(measured[last.name][1], expected, rtol=1e-5, atol=1e-6)
    for parts in measured.values():
        assert all(part.square().mean().item() == pytest.approx(1.0) for part in parts)
    assert all(not m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_the_released_tuning():
    """Without held-out batches, and the heads of the first layer keep scales 1."""
    model = hw.convert(classifier())
    result = hw.pruning.kwon_prune(
        model, task(), loss_fn, macs=0.5, rearrange=False, variant="paper"
    )
    first, second = result.plan.heads.layers
    assert first.scale == [1.0] * len(first.heads)
    assert not result.report["tuning_skipped"] and result.report["tuning_step"] == 1.0
    assert [block["damp"] for block in result.report["tuning"]] == [1.0] * 3
    assert all(scale != 1.0 for scale in second.scale)
    assert all(scale != 1.0 for entry in result.plan.ffn for scale in entry.scale)
    assert all(block["error_left"] < 1.0 for block in result.report["tuning"])
    limited = hw.pruning.kwon_prune(
        model, task(), loss_fn, macs=0.5, variant="paper", max_scale=0.1
    )
    assert "had a scale above 0.1" in limited.report["tuning_skipped"]
    assert all(scale == 1.0 for entry in limited.plan.ffn for scale in entry.scale)
    with pytest.raises(ValueError, match="variant must be 'headwise' or 'paper', got 'x'"):
        hw.pruning.kwon_prune(model, task(), loss_fn, macs=0.5, variant="x")


def test_of_the_last_layer_only_what_the_loss_reads_counts():
    model, batches = hw.convert(classifier()), task(2)
    last = hw.pruning.structure(model).layers[-1].module
    model.requires_grad_(False)
    for batch, read in zip(batches, _read_tokens(model, last, batches, loss_fn), strict=True):
        assert read.shape == batch["input_ids"].shape
        assert read[:, 0].all() and not read[:, 1:].any()  # the pooler takes the first token


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_of_torch(norm_first):
    torch.manual_seed(0)
    model = hw.convert(_encoder(norm_first=norm_first))
    batches = [torch.randn(4, 6, EMBED) for _ in range(6)]
    result = hw.pruning.kwon_prune(
        model, batches, lambda m, x: m(x).square().mean((1, 2)), macs=0.5, tuning_batches=3
    )
    names = [block["name"] for block in result.report["tuning"]]
    kept = [entry.name for entry in result.plan.heads.layers if entry.heads]
    assert sorted(names) == sorted(kept + [n.name for n in result.plan.ffn if n.neurons])
    masked = hw.mask(copy.deepcopy(model), result.plan)
    with torch.no_grad():
        torch.testing.assert_close(
            result.model(batches[0]), masked(batches[0]), rtol=1e-5, atol=1e-5
        )


def planted(model):
    """Makes heads 1 and 2 of the first layer, and half the neurons of the second, do nothing."""
    layers = list(hw.attention_layers(model).values())
    size = EMBED // HEADS
    with torch.no_grad():
        layers[0].out_proj.weight[:, size : 3 * size] *= 1e-3
        second = list(hw.pruning.structure(model).ffn.values())[1].second
        second.weight[:, ::2] *= 1e-3
    return model


def test_what_does_nothing_goes_first():
    model = planted(hw.convert(classifier()))
    found = hw.pruning.structure(model)
    tokens, head = 14 / 3, EMBED // HEADS
    nothing = 2 * _C.head_macs(tokens, EMBED, head) + 16 * _C.neuron_macs(tokens, EMBED)
    result = hw.pruning.kwon_prune(
        model, task(), loss_fn, macs=1 - nothing / found.macs(tokens) + 1e-9, tune=False
    )
    first, second = result.plan.heads.layers
    assert first.heads == [0, 3] and second.heads == [0, 1, 2, 3]
    assert result.plan.ffn[0].neurons == list(range(32))
    assert result.plan.ffn[1].neurons == list(range(1, 32, 2))
    batch = task(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            loss_fn(result.model, batch), loss_fn(model, batch), rtol=0.02, atol=0.02
        )


def test_heads_alone_and_neurons_alone():
    model = classifier()
    heads = hw.pruning.kwon_prune(model, task(), loss_fn, macs=0.8, ffn=False)
    assert heads.plan.ffn == [] and heads.report["macs"] <= 0.8
    neurons = hw.pruning.kwon_prune(model, task(), loss_fn, macs=0.8, heads=False, tokens=5.0)
    assert neurons.plan.heads.layers == [] and neurons.report["macs"] <= 0.8
    with pytest.raises(ValueError, match=r"macs=0.05 cannot be reached: .* nearest is macs=0\.\d"):
        hw.pruning.kwon_prune(model, task(), loss_fn, macs=0.05, ffn=False)


def test_a_limit_on_time(tmp_path):
    model = hw.convert(classifier())
    table = hw.pruning.LatencyTable(
        batch_size=8,
        length=7,
        heads=(1, 2, 3, 4),
        head_seconds=(1.0, 1.0, 1.5, 2.0),
        neurons=(8, 16, 24, 32),
        neuron_seconds=(1.0, 2.0, 3.0, 4.0),
        threads=1,
        device="cpu",
    )
    assert table.head_fit.threshold == 2 and table.neuron_fit.slope == pytest.approx(1 / 8)
    result = hw.pruning.kwon_prune(model, task(), loss_fn, latency=0.5, latency_table=table)
    spent = sum(table.head_fit.seconds(len(e.heads)) for e in result.plan.heads.layers)
    spent += sum(table.neuron_fit.seconds(len(e.neurons)) for e in result.plan.ffn)
    assert spent <= 0.5 * 12 + 1e-9 and result.report["latency"] == pytest.approx(spent / 12)
    assert all(len(entry.heads) != 1 for entry in result.plan.heads.layers)
    # Below the time of all blocks at their thresholds, 4 of 12, whole blocks are dropped.
    short = hw.pruning.kwon_prune(model, task(), loss_fn, latency=0.25, latency_table=table)
    dropped = [not e.heads for e in short.plan.heads.layers]
    dropped += [not e.neurons for e in short.plan.ffn]
    assert any(dropped) and short.report["latency"] <= 0.25
    assert hw.pruning.LatencyTable.from_dict(result.plan.metadata["latency_table"]) == table
    with pytest.raises(
        ValueError, match="latency=0.1 cannot be reached: .* the nearest is latency="
    ):
        hw.pruning.kwon_prune(model, task(), loss_fn, latency=0.1, latency_table=table)
    table.save(tmp_path / "table.json")
    assert hw.pruning.LatencyTable.load(tmp_path / "table.json") == table
    document = {**json.loads((tmp_path / "table.json").read_text()), "head": 1}
    with pytest.raises(ValueError, match="latency table has an unknown key 'head'"):
        hw.pruning.LatencyTable.from_dict(document)
    older = {k: v for k, v in table.to_dict().items() if k not in ("embed_dim", "head_dim")}
    assert hw.pruning.LatencyTable.from_dict(older) == table
    del older["threads"]
    with pytest.raises(ValueError, match="latency table lacks the key 'threads'"):
        hw.pruning.LatencyTable.from_dict(older)


def test_a_latency_table_of_another_model_is_refused():
    model = hw.convert(classifier())
    table = hw.pruning.measure_latency(model, batch_size=2, length=5, budget_s=0.01)
    assert (table.embed_dim, table.head_dim) == (EMBED, EMBED // HEADS)
    changes = [
        ({"embed_dim": 99}, f"got one of embed_dim=99, and layer '.*' has {EMBED}: measure it on"),
        ({"heads": (1, 2), "head_seconds": (1.0, 2.0)}, "times of up to 2 heads for layers of 4"),
        ({"neurons": (1, 9), "neuron_seconds": (1.0, 2.0)}, "up to 9 neurons for layers of 32"),
    ]
    for change, text in changes:
        with pytest.raises(ValueError, match=text):
            hw.pruning.kwon_prune(
                model, task(), loss_fn, latency=0.5, latency_table=replace(table, **change)
            )


def test_times_are_measured():
    table = hw.pruning.measure_latency(
        hw.convert(bert("BertModel")), batch_size=2, length=5, budget_s=0.02
    )
    assert table.heads == (1, 2, 3, 4) and table.neurons[-1] == 32
    assert len(table.head_seconds) == 4 and min(table.neuron_seconds) > 0
    with pytest.raises(ValueError, match="batch_size, length and budget_s must be positive, got 0"):
        hw.pruning.measure_latency(hw.convert(bert("BertModel")), batch_size=0)


@pytest.mark.parametrize(
    ("options", "loss", "text"),
    [
        ({}, loss_fn, "give one of macs and latency, got macs=None and latency=None"),
        ({"macs": 0.5, "latency": 0.5}, loss_fn, "give one of macs and latency, got macs=0.5"),
        ({"macs": 0.5, "damp": -1.0}, loss_fn, "damp must be finite and not negative, got -1.0"),
        (
            {"macs": 0.5, "damp": 1.0, "variant": "paper"},
            loss_fn,
            "damp must not be given with variant='paper', whose damp is 1, got 1.0",
        ),
        (
            {"macs": 0.5, "damp": 1.0, "tune": False},
            loss_fn,
            "damp must not be given with tune=False, which tunes no scales, got 1.0",
        ),
        ({"macs": 0.0}, loss_fn, "macs must be in \\(0, 1\\], got 0.0"),
        ({"macs": 0.5, "heads": False, "ffn": False}, loss_fn, "heads and ffn must not both be"),
        (
            {"macs": 0.5},
            lambda m, b: loss_fn(m, b) * float("nan"),
            "must return a finite loss, got",
        ),
        ({"macs": 0.5}, lambda m, b: loss_fn(m, b) * 0, "scores must not all be 0: the loss does"),
        ({"macs": 0.5}, lambda m, b: torch.zeros(()), "loss that depends on model's output"),
        ({"macs": 0.5}, lambda m, b: 1.0, "loss_fn must return a floating tensor"),
    ],
)
def test_refusals(options, loss, text):
    with pytest.raises(ValueError, match=text):
        hw.pruning.kwon_prune(classifier(), task(2), loss, **options)


def test_models_and_data_that_cannot_be_used():
    with pytest.raises(
        ValueError, match="batches must not be empty: there is nothing to calibrate"
    ):
        hw.pruning.kwon_prune(classifier(), [], loss_fn, macs=0.5)
    gated = hw.convert(classifier(), hw.RandomGate())
    with pytest.raises(ValueError, match="has a RandomGate: remove it first"):
        hw.pruning.kwon_prune(gated, task(1), loss_fn, macs=0.5)
    with pytest.raises(ValueError, match="has no known feed-forward networks to prune"):
        alone = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        hw.pruning.kwon_prune(alone, [torch.randn(2, 3, EMBED)], loss_fn, macs=0.5, heads=False)


def test_an_interrupted_run_leaves_the_model_alone():
    model, seen = hw.convert(classifier()), []

    def interrupted(m, batch):
        seen.append(batch)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss_fn(m, batch)

    with pytest.raises(KeyboardInterrupt):
        hw.pruning.kwon_prune(model, task(), interrupted, macs=0.5)
    assert all(layer.gate is None for layer in hw.attention_layers(model).values())
    assert all(p.requires_grad for p in model.parameters())
    inputs = bert_inputs()
    torch.testing.assert_close(
        model(**inputs).logits, hw.convert(classifier())(**inputs).logits, rtol=0, atol=0
    )
