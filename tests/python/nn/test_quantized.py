"""int8 weights in pruned and gated attention: what is quantized, and that the choice stays."""

import copy
import warnings

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, bert
from torch import nn
from torch.nn.quantized.dynamic import Linear as DynamicLinear

# Gates whose first choice depends on the layer's input alone, in float.
GATES = {"pruned": None, "budget": hw.BudgetGate(budget=0.5), "threshold": hw.ThresholdGate()}
MODELS = ["BertForSequenceClassification", "DistilBertForSequenceClassification"]


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(model)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def is_int8(linear):
    return isinstance(linear, DynamicLinear) or "torchao" in type(linear.weight).__module__


QUANTIZERS = {"quantize_dynamic": dynamic, "torchao": by_torchao}


def build(name, gate):
    torch.manual_seed(0)
    model = hw.convert(ARCHITECTURES[name].build(), gate)
    if gate is None:
        model = hw.prune_heads(model, {0: [1], 1: [0, 2]})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".gate." in key:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("name", MODELS)
def test_split_projections_are_quantized(name, gate, quantizer):
    row = ARCHITECTURES[name]
    model = build(name, gate)
    inputs = row.inputs()
    expected = row.run(model, inputs)
    split = hw.nn.split_projections(copy.deepcopy(model))
    torch.testing.assert_close(row.run(split, inputs), expected, rtol=1e-5, atol=1e-5)
    small = quantizer(split)
    for layer in hw.attention_layers(small).values():
        projections = [layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj]
        assert all(map(is_int8, projections)) and "in_proj_weight" not in layer.state_dict()
    with torch.no_grad(), hw.trace(small) as trace:
        found = row.run(small, inputs)
    assert torch.isfinite(found).all() and not torch.equal(found, expected)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.1  # of int8; a wrong head is another vector
    if gate is not None:  # heads were skipped
        assert any((selection.count < 4).any() for selection in trace.selections.values())


def test_a_quantized_layer_equals_the_oracle():
    """Chosen heads only, and every head times its weight, by the same int8 projections."""
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(32, 4, batch_first=True, gate=hw.FixedGate([0, 3])).eval()
    layer = dynamic(nn.Sequential(hw.nn.split_projections(layer)))[0]
    x, padding = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    call = {"key_padding_mask": padding, "need_weights": False}
    with torch.no_grad():
        found, _ = layer(x, x, x, **call)
        seen = []
        layer._probe = lambda own, probe: seen.append(probe.context)
        oracle, _ = layer(x, x, x, **call)
    torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-5)
    assert seen[0].shape == (3, 4, 7, 8) and (seen[0][:, 1] != 0).any()


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("gate", [None, hw.BudgetGate(keep=0.5)], ids=["pruned", "budget"])
def test_decoders_are_quantized_as_they_are(quantizer, gate):
    row = ARCHITECTURES["LlamaForCausalLM"]
    model = build(row.name, gate)
    inputs = row.inputs()
    expected = row.run(model, inputs)
    small = quantizer(model)
    layers = hw.attention_layers(small).values()
    assert all(is_int8(own) for layer in layers for own in (layer.q_proj, layer.o_proj))
    found = row.run(small, inputs)
    assert (found - expected).norm() / expected.norm() < 0.1 and not torch.equal(found, expected)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"call headwise\.convert first"):
        hw.nn.split_projections(bert("BertModel"))
    layer = hw.MultiheadAttention(16, 4, add_bias_kv=True)
    model = nn.Sequential(hw.MultiheadAttention(16, 4), layer)
    with pytest.raises(ValueError, match="layer '1' adds keys of its own"):
        hw.nn.split_projections(model)
    assert type(model[0]) is hw.MultiheadAttention  # nothing was changed


def test_a_split_model_is_for_inference(tmp_path):
    model = hw.nn.split_projections(hw.convert(bert("BertModel")))
    assert hw.nn.split_projections(model) is model  # again: nothing is left to do
    for call in (lambda: hw.save(model, tmp_path), lambda: hw.prune_heads(model, {0: [1]})):
        with pytest.raises(ValueError, match="split projections cannot be saved or pruned"):
            call()
    small = dynamic(model)
    with pytest.raises(TypeError, match="gate must be set before the layer is quantized"):
        next(iter(hw.attention_layers(small).values())).set_gate(hw.BudgetGate(keep=0.5))
