"""Converted and pruned models as ONNX, run by onnxruntime on other batches and lengths.

``pip install onnx onnxscript onnxruntime``: they are large, and nothing else here needs them.
"""

import warnings

import headwise as hw
import pytest
import torch
from headwise.serialization import export_onnx
from support.architectures import ARCHITECTURES

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#: Which dimensions of every input may change.
DYNAMIC = {
    "BertForSequenceClassification": {"input_ids": (0, 1), "attention_mask": (0, 1)},
    "ViTForImageClassification": {"pixel_values": (0,)},
}


@pytest.mark.parametrize("pruned", [False, True], ids=["converted", "pruned"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_onnxruntime_computes_what_the_model_computes(name, pruned, tmp_path):
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    model = hw.convert(row.build())
    if pruned:
        model = hw.prune_heads(model, {0: [1, 2], 1: [0]})
    inputs = row.inputs()
    shapes = {
        key: dict.fromkeys(places, torch.export.Dim.DYNAMIC)
        for key, places in DYNAMIC[name].items()
    }
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, shorter in ((3, 0), (2, 2), (1, 3)):
        fewer = {key: value[:rows] for key, value in inputs.items()}
        if 1 in next(iter(DYNAMIC[name].values())):
            fewer = {key: value[:, : value.size(1) - shorter] for key, value in fewer.items()}
        with torch.no_grad():
            expected = model(**fewer).logits
        given = {own.name: fewer[own.name].numpy() for own in session.get_inputs()}
        (found, *_) = session.run(None, given)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_decoder_exports_as_its_original_class_padding_included(tmp_path):
    torch.manual_seed(0)
    row = ARCHITECTURES["LlamaForCausalLM"]
    small = hw.prune_heads(hw.convert(row.build()), {0: [0, 1], 1: [0, 1]})  # one group of each
    small.save_pretrained(tmp_path)
    original = type(small).from_pretrained(tmp_path).eval()
    inputs = {**row.inputs(), "use_cache": False}
    both = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"input_ids": both, "attention_mask": both, "use_cache": None}
    program = torch.onnx.export(original, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    fewer = {key: inputs[key][:2, 1:] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = small(**fewer, use_cache=False).logits
    given = {own.name: fewer[own.name].numpy() for own in session.get_inputs()}
    (found, *_) = session.run(None, given)
    tokens = fewer["attention_mask"] == 1
    assert not tokens.all()
    torch.testing.assert_close(
        torch.from_numpy(found)[tokens], expected[tokens], rtol=1e-4, atol=1e-4
    )


def run(path, kwargs):
    """What onnxruntime computes, and the file's metadata."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {own.name: kwargs[own.name].numpy() for own in session.get_inputs()}
    found = torch.from_numpy(session.run(None, given)[0])
    return found, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("way", ["torch.onnx.export", "export_onnx", "export_onnx, gated"])
def test_a_converted_decoder_exports_with_rows_padded_on_the_left(way, tmp_path):
    torch.manual_seed(0)
    row = ARCHITECTURES["LlamaForCausalLM"]
    gated = way.endswith("gated")
    model = hw.convert(row.build(), hw.BudgetGate(keep=0.5) if gated else None)
    inputs = {**row.inputs(), "use_cache": False}
    inputs["attention_mask"][1, :3] = 0  # queries that see no key
    both = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"input_ids": both, "attention_mask": both, "use_cache": None}
    path = tmp_path / "model.onnx"
    if way == "torch.onnx.export":
        torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True).save(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # every head runs
            export_onnx(model, path, kwargs=inputs, dynamic_shapes=shapes)
    fewer = {key: inputs[key][:2, 1:] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**fewer, use_cache=False).logits
    found, metadata = run(path, fewer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # padded rows too
    if way != "torch.onnx.export":
        words = "masked, not skipped: all 8" if gated else "8 attention heads in 2 layers, all of"
        assert words in metadata["headwise"]


def test_a_gated_encoder_exports_masked(tmp_path):
    torch.manual_seed(0)
    row = ARCHITECTURES["BertForSequenceClassification"]
    model = hw.convert(row.build(), hw.BudgetGate(keep=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    inputs = row.inputs()
    shapes = dict.fromkeys(inputs, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC))
    with pytest.warns(UserWarning, match="masked, not skipped"):
        export_onnx(model, tmp_path / "model.onnx", kwargs=inputs, dynamic_shapes=shapes)
    fewer = {key: value[:2, :-1] for key, value in inputs.items()}
    with torch.no_grad(), hw.trace(model) as trace:
        expected = model(**fewer).logits
    found, metadata = run(tmp_path / "model.onnx", fewer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "the choice saves no time in this program" in metadata["headwise"]
    assert any((selection.count < 4).any() for selection in trace.selections.values())


def test_torch_onnx_export_has_no_operators_for_gates():
    row = ARCHITECTURES["BertForSequenceClassification"]
    model = hw.convert(row.build(), hw.BudgetGate(keep=0.5))
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(model, (), kwargs=row.inputs(), dynamo=True)
