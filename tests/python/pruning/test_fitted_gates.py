"""Gates fitted to a frozen model: inputs of two kinds that need different heads."""

import copy

import headwise as hw
import pytest
import torch
from headwise.gates.model import gates
from headwise.pruning import fit_gates, fitted_gates
from torch import nn

WIDTH, HEADS, KINDS = 24, 4, 2


class Switch(nn.Module):
    """Each kind of input (a constant feature tells which) is answered by one head of each layer."""

    def __init__(self, layers=2, gate=None):
        super().__init__()
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(WIDTH, HEADS, batch_first=True, gate=gate) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, 5)
        generator = torch.Generator().manual_seed(5)
        width = WIDTH // HEADS
        with torch.no_grad():
            for layer in self.layers:
                layer.in_proj_weight.zero_()
                layer.in_proj_bias.zero_()
                values = layer.in_proj_weight[2 * WIDTH :].view(HEADS, width, WIDTH)
                for head in range(HEADS):
                    # Reads the features of its kind; heads of no kind read nothing.
                    own = slice(2 + head * 5, 7 + head * 5)
                    if head < KINDS:
                        values[head, :5, own] = torch.eye(5)
                layer.out_proj.weight.copy_(
                    torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
                )
                layer.out_proj.bias.zero_()
                layer.out_proj.weight[:12] = 0.0  # what tells the kinds apart stays in the stream
            self.head.weight.copy_(torch.randn(5, WIDTH, generator=generator))
            self.head.weight[:, :12] = 0.0
            self.head.bias.zero_()
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def batches_of(count=8, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.zeros(size, 6, WIDTH)
        for row in range(size):
            kind = row % KINDS
            x[row, :, kind] = 3.0
            own = slice(2 + kind * 5, 7 + kind * 5)
            x[row, :, own] = torch.randn(6, 5, generator=generator)
        found.append(x)
    return found


def gated(**options):
    return hw.HardConcreteGate(input_dependent=True, kept_weight="one", **options)


def test_each_kind_of_input_gets_its_heads():
    model, dense = Switch(gate=gated()), Switch()
    fit = fit_gates(model, batches_of(), keep=0.25, repaired=False)
    fresh = torch.cat(batches_of(seed=7))
    with torch.no_grad(), hw.trace(model) as trace:
        actual, expected = model(fresh), dense(fresh)
    wanted = torch.eye(HEADS, dtype=torch.bool)[torch.arange(len(fresh)) % KINDS]  # [N, H]
    ran = [record.weight != 0 for record in trace.selections.values()]
    assert all(float((own == wanted).double().mean()) > 0.93 for own in ran)
    right = torch.stack([(own == wanted).all(1) for own in ran]).all(0)  # [N]
    torch.testing.assert_close(actual[right], expected[right], atol=1e-3, rtol=1e-3)
    assert abs(fit.share - 0.25) < 0.01
    assert all(explained > 0.4 for explained in fit.explained.values())
    assert fit.repairs == []


@pytest.mark.parametrize("keep", [0.125, 0.3, 0.5, 0.75])
def test_the_share_is_met(keep):
    torch.manual_seed(0)
    model = hw.convert(Plain().eval(), gated())
    batches = [torch.randn(8, 5, WIDTH) for _ in range(12)]
    fit = fit_gates(model, batches, keep)
    with torch.no_grad(), hw.trace(model) as trace:
        model(torch.cat(batches))
    ran = torch.cat([record.count.double() for record in trace.selections.values()])
    assert abs(float(ran.mean()) / HEADS - fit.share) < 1e-6
    assert abs(fit.share - keep) < 0.02
    assert [repair.name for repair in fit.repairs] == list(fit.explained)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def test_the_weights_stay_unless_repaired():
    model = Switch(gate=gated())
    before = copy.deepcopy(model.state_dict())
    fit = fit_gates(model, batches_of(), keep=0.25, repaired=False)
    assert fit.repairs == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".gate." not in name), name


def test_saved_and_trained_with_frozen_gates(tmp_path):
    model = Switch(gate=gated(hard_from=0.0))
    fit_gates(model, batches_of(), keep=0.25)
    (x,) = batches_of(1, seed=9)
    with torch.no_grad():
        expected = model(x)
    hw.save(model, tmp_path / "fitted")
    torch.testing.assert_close(hw.load(tmp_path / "fitted", model=Switch())(x), expected)
    for gate in gates(model):
        gate.requires_grad_(False)
    optimizer = torch.optim.SGD(hw.parameter_groups(model, lr=0.01))
    matrices = [gate.relevance.weight.clone() for gate in gates(model)]
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    for gate, matrix in zip(gates(model), matrices, strict=True):
        assert torch.equal(gate.relevance.weight, matrix)
    assert model.layers[0].out_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("gate", "batches", "options", "message"),
    [
        (gated(), [], {}, "batches must not be empty"),
        (gated(), batches_of(1, size=3), {}, "at least 4 inputs, got 3"),
        (gated(), batches_of(1), {"keep": 1.0}, r"keep must be in \(0, 1\), got 1.0"),
        (gated(), batches_of(1), {"weight": 0.0}, r"weight must be in \(0, 1\)"),
        (gated(), batches_of(1), {"ridges": ()}, "ridges must be positive, at least one"),
        (gated(), batches_of(1), {"ridges": (0.1, -1.0)}, "ridges must be positive"),
        (None, batches_of(1), {}, r"HardConcreteGate\(input_dependent=True\), got no gate"),
        (hw.HardConcreteGate(), batches_of(1), {}, "got a static one"),
        (hw.BudgetGate(keep=0.5), batches_of(1), {}, "got a BudgetGate"),
        (gated(), [torch.full((4, 3, WIDTH), torch.nan)], {}, "finite logits"),
        (gated(), batches_of(1), {"forward_fn": lambda m, x: x[:, 0]}, "depend on the model's"),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(gate, batches, options, message):
    model = Switch(gate=gate)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_gates(model, batches, **{"keep": 0.5, **options})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(layer.gate is not None for layer in model.layers) == (gate is not None)


def test_what_is_no_number_is_named():
    model = Switch(gate=gated())
    with pytest.raises(TypeError, match="keep must be"):
        fit_gates(model, batches_of(1), keep="half")
    with pytest.raises(TypeError, match="weight must be"):
        fit_gates(model, batches_of(1), keep=0.5, weight=None)


def test_an_error_after_the_repair_restores_the_weights(monkeypatch):
    model, calls = Switch(gate=gated()), []
    before = copy.deepcopy(model.state_dict())
    own = fitted_gates._set_threshold

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return own(*arguments)

    monkeypatch.setattr(fitted_gates, "_set_threshold", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        fit_gates(model, batches_of(), keep=0.25)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
