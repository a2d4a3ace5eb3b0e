"""GumbelSigmoidGate (AdaViT) and SharedHeadsGate (MoH)."""

import copy

import headwise as hw
import pytest
import torch

ops = torch.ops.headwise
D, H = 16, 6


def test_gumbel_sigmoid_against_plain_formulas():
    torch.manual_seed(0)
    logits = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    u = torch.rand(5, H, dtype=torch.float64)
    early, late = torch.tensor(0.1), torch.tensor(0.9)
    _, _, weight, expected = ops.gumbel_sigmoid_select(logits, u, early, True, True, 0.5, 5.0)
    noise = (u / (1 - u)).log()
    y = torch.sigmoid((logits + noise) / 5.0)
    assert torch.equal(weight.detach(), (y > 0.5).double())
    torch.testing.assert_close(expected, weight.sum(1))
    direction = torch.randn(5, H, dtype=torch.float64)
    ours = torch.autograd.grad((weight * direction).sum(), logits)[0]
    theirs = torch.autograd.grad((y * direction).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs)
    for training, progress in ((True, late), (False, early)):
        index, count, weight, _ = ops.gumbel_sigmoid_select(
            logits, u, progress, training, False, 0.5, 5.0
        )
        assert torch.equal(weight.detach(), (logits > 0).double())
        assert torch.equal(count.long(), (logits > 0).sum(1))


def test_logistic_noise_is_the_difference_of_gumbels():
    torch.manual_seed(0)
    logits = torch.tensor([[-1.0, 0.0, 1.0, 3.0]]).expand(20_000, 4)
    _, _, weight, _ = ops.gumbel_sigmoid_select(
        logits, torch.rand(20_000, 4), torch.tensor(0.0), True, True, 1.0, 5.0
    )
    torch.testing.assert_close(weight.mean(0), torch.sigmoid(logits[0]), atol=0.02, rtol=0)


def train(gate, steps=200):
    """Two kinds of input need two heads each."""
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(gate.parameters(), 0.05)
    kind = torch.arange(64) % 2
    useful = torch.zeros(64, H)
    useful[kind == 0, :2] = useful[kind == 1, 3:5] = 1
    direction = torch.randn(D)
    for step in range(steps):
        hw.anneal(gate, step / (steps - 1))
        x = torch.randn(64, 3, D) + direction * (2.0 * kind - 1)[:, None, None]
        loss = -(gate(x).weight * useful).sum(1).mean() + hw.penalty(gate)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return gate.eval()(x), useful


def test_gumbel_sigmoid_learns_different_heads_for_different_inputs():
    torch.manual_seed(0)
    selection, useful = train(
        hw.GumbelSigmoidGate(1 / 3, temperature=1.0, init_logit=1.0).bind(D, H)
    )
    assert ((selection.weight * useful).sum(1) > 1.5).float().mean() > 0.9
    assert abs(selection.count.float().mean() / H - 1 / 3) < 0.08


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_released_losses_of_adavit(scope):
    """Two layers of 6 and 4 heads against the sums written out; gradients too."""
    torch.manual_seed(0)
    options = {"warmup": 0.5, "initial_keep": 0.9, "target_scope": scope, "static_until": 0.0}
    model = torch.nn.ModuleList(
        hw.GumbelSigmoidGate(0.3, penalty="adavit", init_logit=0.5, **options).bind(D, heads)
        for heads in (6, 4)
    ).double()
    for gate in model:
        torch.nn.init.normal_(gate.relevance.weight)
    hw.anneal(model, 0.25)
    # Halfway from 0.9 to 0.3, counted in logits.
    aimed = torch.tensor([0.9, 0.3], dtype=torch.float64).logit().mean().sigmoid()
    x = torch.randn(7, 3, D, dtype=torch.float64)
    chosen = [gate(x) for gate in model]
    penalty = hw.penalty(model)

    def own(selection):
        p = torch.sigmoid(selection.relevance)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
        return 0.1 * ((selection.weight.mean(0) - aimed).abs().mean() - entropy)

    def usage(*selections):
        ran = sum(selection.weight.sum(1).mean() for selection in selections)
        return (ran / sum(s.weight.size(1) for s in selections) - aimed).abs()

    terms = torch.stack([own(selection) for selection in chosen])
    if scope == "model":
        expected = 2 * (usage(*chosen) + terms.mean())
    else:
        expected = 2 * (torch.stack([usage(selection) for selection in chosen]) + terms).mean()
    torch.testing.assert_close(penalty, expected)
    parameters = [p for p in model.parameters()]
    for got, plain in zip(
        torch.autograd.grad(penalty, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, plain)
        assert bool(got.abs().sum() > 0)


def test_the_entropy_of_certain_gates_is_zero():
    logits = torch.tensor([[800.0, -800.0, 30.0, 0.0]], dtype=torch.float64).requires_grad_()
    weight = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    loss = ops.gumbel_sigmoid_regulariser(logits, weight, torch.tensor(1.0), 0.5, 0.9, 0.5, 10.0)
    entropy = torch.log(torch.tensor(2.0, dtype=torch.float64)) / 4
    torch.testing.assert_close(loss, 0.5 - entropy, atol=1e-9, rtol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isfinite().all())


def test_a_model_of_both_penalties_has_the_default_strength_of_each():
    assert hw.GumbelSigmoidGate(penalty="adavit").bind(D, H).strength == 2.0
    assert hw.GumbelSigmoidGate().bind(D, H).strength == 20.0
    with pytest.raises(ValueError, match="penalty must be"):
        hw.GumbelSigmoidGate(penalty="l0")


@pytest.mark.parametrize("shared", [[0], [2, 5], [0, 1, 2, 3, 4, 5], []])
def test_shared_heads_always_run_and_the_others_are_the_inner_gate_s(shared):
    torch.manual_seed(0)
    gate = hw.SharedHeadsGate(hw.BudgetGate(budget=0.5), shared=shared).bind(D, H).eval()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    x = torch.randn(7, 4, D)
    selection, routed = gate(x), gate.gate(x)
    rest = [head for head in range(H) if head not in shared]
    assert (selection.weight[:, shared] == 1).all()
    assert torch.equal(selection.weight[:, rest], routed.weight)
    assert torch.equal(selection.count, routed.count + len(shared))
    for b in range(7):
        chosen = selection.index[b, : selection.count[b]].tolist()
        assert chosen == selection.weight[b].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "inner",
    [
        hw.RandomGate(0.5),
        hw.FixedGate([0]),
        hw.HardConcreteGate(input_dependent=True),
        hw.SubsetGate(3),
        hw.RequestedBudgetGate(0.5),
        hw.GumbelSigmoidGate(0.5),
        hw.SleepGate(0.5),
    ],
    ids=lambda gate: type(gate).__name__,
)
def test_shared_heads_of_every_gate_in_a_model(inner):
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(D, 4, 16, batch_first=True, dropout=0.0), 2
    )
    model = hw.convert(model, hw.SharedHeadsGate(inner, shared=[3]))
    x = torch.randn(3, 4, D)
    hw.anneal(model, 0.8)
    (model.train()(x).square().sum() + hw.penalty(model)).backward()
    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), hw.trace(twin) as trace:
        twin(x)
    assert all((s.weight[:, 3] == 1).all() for s in trace.selections.values())


def test_penalty_of_a_wrapped_gate_is_that_gate_s():
    torch.manual_seed(0)
    gate = hw.SharedHeadsGate(hw.GumbelSigmoidGate(0.4, warmup=0.0), shared=2).bind(D, H)
    gate.anneal(0.9)
    hw.anneal(gate, 0.9)
    gate(torch.randn(5, 4, D))
    share = gate.gate.expected_heads.mean() / 4
    torch.testing.assert_close(hw.penalty(gate), 20.0 * (share - 0.4) ** 2)
    torch.testing.assert_close(gate.expected_heads, gate.gate.expected_heads + 2)


def test_start_shares_the_most_important_heads():
    options = {"gate": hw.SharedHeadsGate(hw.BudgetGate(0.5), shared=1), "batch_first": True}
    model = torch.nn.ModuleDict(
        {name: hw.MultiheadAttention(12, 3, **options) for name in ("first", "second")}
    )
    importance = {"first": torch.tensor([3.0, 9.0, 1.0]), "second": torch.tensor([7.0, 2.0, 8.0])}
    hw.start_gates(model, importance, keep=0.5)
    assert model["first"].gate.shared.tolist() == [1]
    assert model["second"].gate.shared.tolist() == [2]
    start = model["second"].gate.gate.base  # heads 0 and 1
    assert start[0] > 0 > start[1]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: hw.SharedHeadsGate(3), TypeError, "gate must be a headwise.Gate, got int"),
        (
            lambda: hw.SharedHeadsGate(hw.RandomGate(), shared=[6]).bind(D, H),
            ValueError,
            "shared must be in 0..5, got 6",
        ),
        (
            lambda: hw.SharedHeadsGate(hw.RandomGate(), shared=[1, 1]),
            ValueError,
            "shared must not name a head twice, got 1 again",
        ),
        (
            lambda: hw.SharedHeadsGate(hw.ThresholdGate()),
            ValueError,
            "gate must choose by the layer's input, and this one reads queries and keys",
        ),
        (
            lambda: hw.GumbelSigmoidGate(temperature=0.0),
            ValueError,
            "temperature must be positive and finite, got 0.0",
        ),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error) as raised:
        build()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "gate",
    [
        hw.SubsetGate(3),
        hw.RequestedBudgetGate(0.5),
        hw.GumbelSigmoidGate(0.5),
        hw.SleepGate(0.5),
        hw.ThresholdGate(0.5, block_ratio=0.1),
        hw.SharedHeadsGate(hw.BudgetGate(0.5), shared=[1]),
    ],
    ids=lambda gate: type(gate).__name__,
)
def test_layers_compile_whole(gate):
    torch.manual_seed(0)
    layer = hw.link_gates(hw.MultiheadAttention(D, 4, gate=gate, batch_first=True)).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        expected = layer(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
