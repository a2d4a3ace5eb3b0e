"""The analyses and searches of the C++ API give Python's numbers: tests/cpp/analysis_parity.cpp."""

import json

import headwise as hw
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.programs import find_program, run_program
from torch import nn

PROGRAM = find_program("analysis_parity")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="tests/cpp is not built")
D, H = 8, 4


class Model(nn.Module):
    """Two attention layers, each added to its input, and a classifier of the first token."""

    def __init__(self, gate=None):
        super().__init__()
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(D, H, batch_first=True, gate=gate) for _ in range(2)
        )
        self.head = nn.Linear(D, 3)
        self.double()

    def forward(self, x, padding):
        for layer in self.layers:
            x = x + layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.head(x[:, 0])


def losses(model, batch):
    x, padding, labels = batch
    return nn.functional.cross_entropy(model(x, padding), labels, reduction="none")


def perturbed(model):
    """Biases and gates away from their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("analyses")
    models = {
        "plain": perturbed(Model()),
        "gated": perturbed(Model(hw.BudgetGate(keep=0.5))),
        "threshold": perturbed(Model(hw.ThresholdGate(resolution=8.0))),
    }
    for name, model in models.items():
        hw.save(model, folder / name)
    batches = []
    for size in (5, 4, 6):
        padding = torch.arange(7) >= torch.randint(3, 8, (size, 1))
        x = torch.randn(size, 7, D, dtype=torch.float64)
        batches.append((x, padding, torch.randint(3, (size,))))
    save_file(
        {
            f"{name}.{i}": tensor
            for i, batch in enumerate(batches)
            for name, tensor in zip(("x", "padding", "labels"), batch, strict=True)
        },
        str(folder / "data.safetensors"),
    )
    run_program(PROGRAM, folder)
    found = json.loads((folder / "found.json").read_text())
    return models, batches, found, load_file(str(folder / "found.safetensors"))


def close(found, scores, **options):
    for values, expected in zip(found, scores.values(), strict=True):
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), expected, atol=1e-9, rtol=1e-9, **options
        )


def test_the_models_are_the_same(problem):
    models, batches, _, tensors = problem
    with torch.no_grad():
        expected = models["plain"](*batches[0][:2])
    torch.testing.assert_close(tensors["logits"], expected)


@pytest.mark.parametrize("absolute", ["per_token", "per_example", "per_batch"])
def test_scores(problem, absolute):
    models, batches, found, _ = problem
    metrics = ["michel", "entropy", "attention_confidence", "hies"]
    expected = hw.score_heads(
        models["plain"], batches, losses, metrics, absolute=absolute, alpha=0.3, scope="layer"
    )
    for metric in metrics:
        close(found["scores"][absolute][metric], expected[metric].values)


def test_calibration(problem):
    models, batches, found, _ = problem
    model = models["threshold"]
    expected = hw.calibrate_threshold(
        model, batches, 0.5, forward_fn=lambda model, batch: model(*batch[:2])
    )
    assert found["threshold"] == pytest.approx(expected, abs=1e-12)
    assert expected > 0


def test_confidence_policy(problem):
    models, batches, found, _ = problem
    policy = hw.analysis.ConfidencePolicy(models["gated"], factors=(0.4, 1.0, 1.7))
    inputs = [batch[:2] for batch in batches]
    made = found["policy"]
    assert made["fit"] == pytest.approx(min(policy.fit(inputs, 5.0), 1e300))
    labels = {id(pair): batch[2] for pair, batch in zip(inputs, batches, strict=True)}
    fitted = policy.fit_accuracy(inputs, lambda pair: labels[id(pair)], loss=0.1, certainty=0.6)
    assert made["fitted"] == pytest.approx(
        [min(fitted.threshold, 1e300), fitted.heads, fitted.accuracy, fitted.widest_heads,
         fitted.widest_accuracy]
    )  # fmt: skip
    seen = policy.predict(inputs[0])
    assert made["stage"] == seen.stage.tolist()
    assert made["total"] == seen.total_heads.tolist()
    assert made["reasons"] == [seen.reason(row) for row in range(len(seen.stage))]
