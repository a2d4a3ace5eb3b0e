"""Models to explain, and walking over what was found."""

import headwise as hw
import torch
from torch import nn


def trained(model: nn.Module) -> nn.Module:
    """Gates as training might leave them: they depend on the input."""
    for layer in hw.attention_layers(model).values():
        gate = layer.gate
        if gate is None or isinstance(gate, hw.FixedGate):
            continue
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.normal_()
            if hasattr(gate, "feature_mean"):
                gate.feature_mean.normal_()
                gate.feature_variance.uniform_(0.2, 2.0)
                gate.relevance.weight.mul_(2.0)
            if hasattr(gate, "log_alpha"):
                gate.log_alpha.sub_(2.0)
    hw.anneal(model, 1.0)
    return model


def heads_of(explanation):
    """(input, site, gate, head's entry) of every head."""
    for b, entry in enumerate(explanation.inputs):
        for layer in entry["layers"]:
            for head in layer["heads"]:
                yield b, layer["site"], layer["gate"], head
