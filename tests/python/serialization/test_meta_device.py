"""hw.load into a model on the meta device: everything comes to the CPU with its values."""

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES
from torch import nn

transformers = pytest.importorskip("transformers")

GATES = {
    "no gate": None,
    "budget": hw.BudgetGate(keep=0.5),
    "requested": hw.RequestedBudgetGate(0.5),
    "group": hw.GroupGate(hw.HardConcreteGate(input_dependent=True)),
    "fixed": hw.FixedGate([0, 3]),
}
ROWS = {n: r for n, r in ARCHITECTURES.items() if not n.startswith(("Multihead", "Transformer"))}


def on_meta(model):
    held = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in held if tensor.is_meta]


@pytest.mark.parametrize("before", ["", "converted", "gated"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel"]
)
def test_a_model_on_the_meta_device(name, gate, before, tmp_path):
    torch.manual_seed(0)
    row = ROWS[name]
    saved = hw.convert(row.build(), GATES[gate])
    hw.save(saved, tmp_path)
    with torch.device("meta"):
        model = type(saved)(saved.config)
    if before:
        hw.convert(model, hw.BudgetGate(keep=0.5) if before == "gated" else None)
    loaded = hw.load(tmp_path, model=model).eval()
    assert loaded is model and not on_meta(loaded)
    inputs = row.inputs()
    assert torch.equal(row.run(loaded, inputs), row.run(saved, inputs))
    if name == "LlamaForCausalLM":
        own, theirs = (m.generate(**inputs, max_new_tokens=3, do_sample=False)
                       for m in (saved, loaded))  # fmt: skip
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_architecture(row, tmp_path):
    torch.manual_seed(0)
    saved = hw.convert(row.build())
    hw.save(saved, tmp_path)
    with torch.device("meta"):
        model = type(saved)(saved.config)
    loaded = hw.load(tmp_path, model=model).eval()
    assert not on_meta(loaded)
    inputs = row.inputs()
    assert torch.equal(row.run(loaded, inputs), row.run(saved, inputs))


def test_a_pruned_decoder_on_the_meta_device(tmp_path):
    torch.manual_seed(0)
    row = ROWS["LlamaForCausalLM"]
    small = hw.prune(hw.convert(row.build(), hw.FixedGate([0, 1, 2])))
    hw.save(small, tmp_path)
    with torch.device("meta"):
        model = type(small)(small.config)
    loaded = hw.load(tmp_path, model=model).eval()
    assert not on_meta(loaded)
    inputs = row.inputs()
    assert torch.equal(row.run(loaded, inputs), row.run(small, inputs))


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    saved = hw.convert(ROWS["GPT2LMHeadModel"].build())
    hw.save(saved, tmp_path)
    with torch.device("meta"):
        model = type(saved)(saved.config)
    loaded = hw.load(tmp_path, model=model)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_half_precision_and_what_is_trained_stay(tmp_path):
    saved = hw.convert(ROWS["BertModel"].build().bfloat16())
    hw.save(saved, tmp_path)
    with torch.device("meta"):
        model = type(saved)(saved.config)
    model.embeddings.requires_grad_(False)
    loaded = hw.load(tmp_path, model=model)
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())
    assert not any(p.requires_grad for p in loaded.embeddings.parameters())
    assert all(p.requires_grad for p in loaded.encoder.parameters())


class Own(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("table", torch.arange(4.0), persistent=persistent)

    def forward(self, x):
        return self.attention(x, x, x)[0] + self.table[0]


def test_a_buffer_that_nobody_knows_is_refused_by_name(tmp_path):
    saved = hw.convert(Own(True).eval())
    hw.save(saved, tmp_path / "a")
    with torch.device("meta"):
        model = Own(True).eval()
    loaded = hw.load(tmp_path / "a", model=model)
    x = torch.randn(2, 3, 8)
    assert torch.equal(loaded(x), saved(x)) and torch.equal(loaded.table, torch.arange(4.0))
    hw.save(hw.convert(Own(False)), tmp_path / "b")
    with torch.device("meta"):
        model = Own(False)
    with pytest.raises(ValueError, match="buffer 'table' on the meta device, and it is in no file"):
        hw.load(tmp_path / "b", model=model)
