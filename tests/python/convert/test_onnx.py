"""Converted and pruned models as ONNX, run by onnxruntime on other batches and lengths.

``pip install onnx onnxscript onnxruntime``: they are large, and nothing else here needs them.
"""

import headwise as hw
import pytest
import torch
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


def test_gates_have_no_operators_in_onnx(tmp_path):
    row = ARCHITECTURES["BertForSequenceClassification"]
    model = hw.convert(row.build(), hw.BudgetGate(keep=0.5))
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(model, (), kwargs=row.inputs(), dynamo=True)
