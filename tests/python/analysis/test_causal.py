"""Causal head gating where it is known which heads help, hinder and do neither."""

import math

import headwise as hw
import pytest
import torch
from support.planted import Planted, squared

NAME = "layers.0"


@pytest.fixture
def problem():
    """y = x0 + x3; head 1 of the model adds noise, head 2 nothing."""
    x = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    x[4:] *= -1
    return Planted([1.0, 1.0, 0.0, 1.0]), [
        (x[:4], x[:4, 0] + x[:4, 3]),
        (x[4:], -x[:4, 0] - x[:4, 3]),
    ]


def test_formulas():
    logits = torch.tensor([-9.0, -1.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    penalty = torch.ops.headwise.causal_penalty(logits, 0.1, 4.0)
    assert penalty.item() == pytest.approx(-0.1 * (-4 - 1 + 0.5 + 4))
    (gradient,) = torch.autograd.grad(penalty, logits)
    assert gradient.tolist() == pytest.approx([0, -0.1, -0.1, 0])
    ends = torch.tensor([-4.0, 4.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.ops.headwise.causal_penalty(ends, 0.1, 4.0), ends)
    assert gradient.tolist() == pytest.approx([-0.1, -0.1])  # a gate at an end can leave it
    raised = torch.tensor([0.9, 0.2, 1.0, 0.5])
    lowered = torch.tensor([0.8, 0.1, 0.0, 0.5])
    parts = torch.ops.headwise.causal_roles(raised, lowered)
    torch.testing.assert_close(parts[0], torch.tensor([0.8, 0.1, 0.0, 0.5]))
    torch.testing.assert_close(parts[1], torch.tensor([0.1, 0.8, 0.0, 0.5]))
    torch.testing.assert_close(sum(parts), torch.ones(4))
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        torch.ops.headwise.causal_penalty(logits, 0.1, 0.0)


def test_planted_roles_are_found(problem):
    model, batches = problem
    model.train()
    found = hw.analysis.causal_heads(model, batches, squared, strength=0.005, steps=150)
    assert found.roles() == {NAME: ["facilitating", "interfering", "irrelevant", "facilitating"]}
    assert found.scores.metric == "causal"
    assert found.scores.values[NAME][1] < -0.5 < 0.5 < found.scores.values[NAME][0]
    # An idle head goes to the ends; the others to where the loss holds the push: with one of four
    # examples a head, (1 - g)^2 g / 2 = strength for a head that helps.
    sigma = 1 / (1 + math.exp(-4))
    assert found.irrelevant[NAME][2].item() == pytest.approx(2 * sigma - 1)
    g = found.facilitating[NAME][0].item()
    assert (1 - g) ** 2 * g / 2 == pytest.approx(0.005, rel=0.1)
    for part in zip(*(p[NAME] for p in (found.facilitating, found.interfering, found.irrelevant)),
                    strict=True):  # fmt: skip
        assert sum(part).item() == pytest.approx(1)
    assert model.training and model.layers[0].gate is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def hinge(model, batch):
    """[B]: nothing beyond an output of 1, so that either of two copies is enough."""
    return (1 - model(batch)).clamp(min=0).square()


def test_of_two_copies_one_is_needed():
    """Heads 0 and 1 do the same and either is enough; head 2 does something else.

    The three stages of the released code by hand: gates drawn uniformly, the loss alone, then with
    each sign of the regulariser from there.
    """
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    strength, steps, fits = 0.02, 200, 6

    def stage(start, sign):
        logits = start.clone().requires_grad_()
        adam = torch.optim.Adam([logits], lr=0.1)
        for _ in range(steps):
            gates = logits.sigmoid()
            loss = ((1 - x @ gates).clamp(min=0) ** 2).mean()
            adam.zero_grad()
            (loss - sign * strength * logits.sum()).backward()
            adam.step()
            with torch.no_grad():
                logits.clamp_(-4, 4)
        return logits.detach()

    found = hw.analysis.causal_heads(
        Planted([1.0, 1.0, 1.0]), [x], hinge, strength=strength, steps=steps, fits=fits, seed=5
    )
    needed = set()
    for fit in range(fits):
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(5 + fit), dtype=torch.float64)
        free = stage(drawn.logit().clamp(-4, 4), 0.0)
        raised, lowered = stage(free, 1.0).sigmoid(), stage(free, -1.0).sigmoid()
        expected = [torch.minimum(raised, lowered), 1 - torch.maximum(raised, lowered)]
        expected.append((raised - lowered).abs())
        torch.testing.assert_close(found.by_fit[NAME][fit], torch.stack(expected))
        roles = found.roles(fit)[NAME]
        assert sorted(roles[:2]) == ["facilitating", "irrelevant"] and roles[2] == "facilitating"
        needed.add(roles.index("facilitating"))
    assert needed == {0, 1}  # chance decides which copy
    torch.testing.assert_close(found.facilitating[NAME], found.by_fit[NAME][:, 0].mean(0))
    # From half-open gates, without the first stage, both copies would look irrelevant.
    both = stage(torch.zeros(3, dtype=torch.float64), -1.0).sigmoid()
    assert both[0] == both[1] < 0.5


def test_an_interrupted_search_goes_on(problem, tmp_path):
    model, batches = problem
    options = dict(strength=0.01, steps=25, fits=1)
    expected = hw.analysis.causal_heads(model, batches, squared, **options)
    calls, failed = [], []

    def fails(model, batch):
        calls.append(1)
        if (
            len(calls) == 39 and not failed
        ):  # step 13 of the second stage, after one look at the loss
            failed.append(1)
            raise KeyError("stop")
        return squared(model, batch)

    path = tmp_path / "gates"
    with pytest.raises(KeyError):
        hw.analysis.causal_heads(model, batches, fails, journal=path, **options)
    calls.clear()
    found = hw.analysis.causal_heads(model, batches, fails, journal=path, **options)
    assert len(calls) == 41  # from step 10 of the second stage
    torch.testing.assert_close(found.scores.values[NAME], expected.scores.values[NAME])
    with pytest.raises(ValueError, match="with strength=0.01, not 0.02"):
        hw.analysis.causal_heads(
            model, batches, squared, strength=0.02, steps=25, fits=1, journal=path
        )
    with pytest.raises(ValueError, match="is of another loss: of the first batch it wa"):
        hw.analysis.causal_heads(
            model, batches, lambda m, b: 2 * squared(m, b), journal=path, **options
        )


def test_the_default_strength_follows_the_loss(problem, tmp_path):
    model, batches = problem
    found = hw.analysis.causal_heads(model, batches, squared, steps=150)
    assert found.roles() == {NAME: ["facilitating", "interfering", "irrelevant", "facilitating"]}
    # Half-open gates: the error is x / 2, or x / 2 more than it should be; its gradient by a logit
    # is 2 * 1/2 * 1/4 for one of four examples a head, and 0 for the idle head.
    assert found.strength == pytest.approx(0.5 * (3 / 16) / 4)
    scaled = hw.analysis.causal_heads(model, batches, lambda m, b: 50 * squared(m, b), steps=150)
    assert scaled.strength == pytest.approx(50 * found.strength)
    assert scaled.roles() == found.roles()
    torch.testing.assert_close(
        scaled.scores.values[NAME], found.scores.values[NAME], atol=0.02, rtol=0
    )
    path = tmp_path / "gates"
    kept = hw.analysis.causal_heads(model, batches, squared, steps=20, journal=path)
    again = hw.analysis.causal_heads(model, batches, squared, steps=20, journal=path)
    assert again.strength == kept.strength
    with pytest.raises(ValueError, match="with strength=None, not 0.5"):
        hw.analysis.causal_heads(model, batches, squared, strength=0.5, steps=20, journal=path)


@pytest.mark.parametrize("factor", [0.03, 0.1, 0.5, 1.0, 2.0, 4.0])
def test_strength_is_the_force_above_which_a_head_helps(factor):
    # One example per head, y = a x: the loss is a^2 (1 - g)^2 / 4, and holds a half-open gate with
    # a^2 / 16. Pushed closed with less, the gate stays more than half open.
    weights = [2.0, 1.0, 0.5, 0.25]
    x = torch.eye(4, dtype=torch.float64)
    batch = (x, torch.tensor(weights, dtype=torch.float64))
    forces = [a**2 / 16 for a in weights]
    strength = factor * sum(forces) / 4
    found = hw.analysis.causal_heads(
        Planted(weights), [batch], squared, strength=strength, steps=300, learning_rate=0.1
    )
    assert found.roles()[NAME] == [
        "facilitating" if force > strength else "irrelevant" for force in forces
    ]


def test_causal_refusals(problem):
    model, batches = problem
    for options, message in (
        (dict(strength=0.0), "strength must be positive and finite, got 0.0"),
        (dict(steps=0), "steps must be positive, got 0"),
        (dict(fits=0), "fits must be positive, got 0"),
        (dict(limit=math.inf), "limit must be positive and finite, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            hw.analysis.causal_heads(model, batches, squared, **options)
    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.analysis.causal_heads(model, [], squared)
    with pytest.raises(ValueError, match="must return a finite loss, got NaN or infinity"):
        hw.analysis.causal_heads(model, batches, lambda m, b: squared(m, b) / 0)
    for loss in (lambda m, b: b[1], lambda m, b: squared(m, b) * 0):
        with pytest.raises(ValueError, match="a loss that depends on the heads, got one whose gra"):
            hw.analysis.causal_heads(model, batches, loss, steps=3)
