"""Parameter groups for an optimizer: each parameter once, gates with separate learning rates."""

import headwise as hw
import pytest
from support.architectures import bert
from torch import nn


def test_parameter_groups():
    model = bert("BertForSequenceClassification", num_labels=2)
    hw.convert(model, hw.BudgetGate(keep=0.5))
    model.classifier.bias.requires_grad_(False)
    groups = hw.parameter_groups(model, 1e-4, gate_lr=0.1, gate_matrix_lr=0.2, weight_decay=0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {(1e-4, 0.3), (1e-4, 0.0), (0.1, 0.0), (0.2, 0.0)}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(n for own in found.values() for n in own) == sorted(trained)
    assert all(".gate." in n for n in found[0.1, 0.0] | found[0.2, 0.0])
    assert not any(".gate." in n for n in found[1e-4, 0.3] | found[1e-4, 0.0])
    assert "classifier.weight" in found[1e-4, 0.3]
    with pytest.raises(ValueError, match="gate_lr must not be negative, got -1"):
        hw.parameter_groups(model, 1e-4, gate_lr=-1)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        hw.parameter_groups([], 1e-4)
    with pytest.raises(ValueError, match="must have a parameter with requires_grad"):
        hw.parameter_groups(nn.ReLU(), 1e-4)
