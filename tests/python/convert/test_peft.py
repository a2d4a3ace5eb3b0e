"""Adapters of PEFT: around what a converted model still calls, or refused by name."""

import warnings

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES

peft = pytest.importorskip("peft")

GATES = {"none": None, "fixed": hw.FixedGate([0, 2]), "budget": hw.BudgetGate(keep=0.5)}
# What adapters fit after a conversion, and what of the original they fitted.
TARGETS = [
    ("LlamaForCausalLM", {"target_modules": ["q_proj", "v_proj"]}),
    ("LlamaForCausalLM", {"target_modules": ["o_proj"]}),
    ("Qwen3ForCausalLM", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    ("GPT2LMHeadModel", {"target_modules": ["q_proj", "o_proj"]}),
    (
        "BertForSequenceClassification",
        {"target_modules": [], "target_parameters": ["mha.in_proj_weight"]},
    ),
]
BEFORE = [
    ("BertForSequenceClassification", ["query", "value"], "self.query"),
    ("BertForSequenceClassification", ["attention.output.dense"], "output.dense"),
    ("DistilBertForSequenceClassification", ["q_lin", "out_lin"], "q_lin"),
    ("LlamaForCausalLM", ["q_proj", "v_proj"], "q_proj"),
    ("LlamaForCausalLM", ["o_proj"], "o_proj"),
    ("GPT2LMHeadModel", ["c_attn"], "c_attn"),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fresh(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build()


def adapted(model, **options):
    """``model`` with adapters that do something."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("name, options", TARGETS, ids=lambda value: str(value)[:40])
def test_adapters_after_a_conversion(name, options, gate, tmp_path):
    """They act, go into files of their own, can be left out, and merge."""
    row = ARCHITECTURES[name]
    inputs = row.inputs()
    plain = row.run(hw.convert(fresh(name), gate), inputs)
    model = adapted(hw.convert(fresh(name), gate), **options)
    expected = row.run(model, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with model.disable_adapter():
        close(row.run(model, inputs), plain)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(hw.convert(fresh(name), gate), tmp_path / "adapters")
    close(row.run(again.eval(), inputs), expected)
    merged = model.merge_and_unload()
    close(row.run(merged, inputs), expected)
    hw.save(merged, tmp_path / "merged")
    close(row.run(hw.load(tmp_path / "merged"), inputs), expected)


@pytest.mark.parametrize("name, options", TARGETS[:3], ids=lambda value: str(value)[:40])
def test_adapters_mean_the_same_on_the_original(name, options):
    """Projections that keep their names take the adapters of the original."""
    row = ARCHITECTURES[name]
    inputs = row.inputs()
    original = adapted(fresh(name), **options)
    expected = row.run(original, inputs)
    close(row.run(adapted(hw.convert(fresh(name)), **options), inputs), expected)


@pytest.mark.parametrize("name, targets, projection", BEFORE)
def test_adapters_before_a_conversion_are_refused_until_they_are_merged(name, targets, projection):
    row = ARCHITECTURES[name]
    inputs = row.inputs()
    model = adapted(fresh(name), target_modules=targets)
    expected = row.run(model, inputs)
    with pytest.raises(ValueError, match=f"its {projection} was replaced by a peft") as error:
        hw.convert(model)
    assert "merge or remove what is around the linear layer" in str(error.value)
    close(row.run(model, inputs), expected, 0.0)
    close(row.run(hw.convert(model.merge_and_unload()), inputs), expected)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_adapters_around_a_weight_that_is_read_are_refused(gate):
    row = ARCHITECTURES["BertForSequenceClassification"]
    model = adapted(hw.convert(fresh(row.name), gate), target_modules=["out_proj"])
    with pytest.raises(TypeError, match="must be a torch.nn.Linear, whose weight is read without"):
        row.run(model, row.inputs())


def step(model, row, inputs):
    """The gates' gradients and warnings of a training step."""
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = row.run(model, inputs).square().mean() + hw.penalty(model)
    loss.backward()
    gates = {
        name.replace("modules_to_save.default.", "").removeprefix("base_model.model."): p.grad
        for name, p in model.named_parameters()
        if ".gate." in name and p.grad is not None
    }
    return gates, [str(warning.message) for warning in caught], loss.item()


def test_gates_are_frozen_with_the_rest():
    row = ARCHITECTURES["LlamaForCausalLM"]
    model = adapted(hw.convert(fresh(row.name), hw.BudgetGate(keep=0.5)), target_modules=["q_proj"])
    gates, messages, _ = step(model, row, row.inputs())
    assert not gates and any("the gates are frozen" in message for message in messages)
    for layer in hw.attention_layers(model).values():
        layer.gate.requires_grad_(True)
    gates, messages, _ = step(model, row, row.inputs())
    assert gates and not any("frozen" in message for message in messages)


@pytest.mark.parametrize(
    "name, target",
    [("LlamaForCausalLM", "up_proj"), ("BertForSequenceClassification", "intermediate.dense")],
)
def test_gates_in_modules_to_save_train_and_are_saved(name, target, tmp_path):
    row, gate = ARCHITECTURES[name], hw.BudgetGate(keep=0.5)
    inputs = row.inputs()
    options = {"target_modules": [target], "modules_to_save": ["gate"]}
    model = peft.get_peft_model(hw.convert(fresh(name), gate), peft.LoraConfig(r=4, **options))
    plain = hw.convert(fresh(name), gate)
    # New adapters change nothing: loss and gradients are those of the model without them.
    torch.manual_seed(5)
    gates, messages, loss = step(model, row, inputs)
    torch.manual_seed(5)
    expected, _, plain_loss = step(plain, row, inputs)
    assert not messages or not any("frozen" in message for message in messages)
    assert loss == pytest.approx(plain_loss, rel=1e-5) and gates.keys() == expected.keys()
    for key, gradient in expected.items():
        close(gates[key], gradient)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    trained = row.run(model, inputs)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(hw.convert(fresh(name), gate), tmp_path / "adapters")
    close(row.run(again.eval(), inputs), trained)
    merged = model.merge_and_unload()
    assert all(isinstance(e.gate, hw.BudgetGate) for e in hw.attention_layers(merged).values())
    close(row.run(merged, inputs), trained)
