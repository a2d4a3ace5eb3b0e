"""Programs of PyTorch's operators alone: what gated and pruned models compute, nothing skipped."""

import headwise as hw
import pytest
import torch
from headwise.serialization import export, plain_program
from support.architectures import ARCHITECTURES, bert
from support.gates import EVERY_GATE, D, H, lively

DYNAMIC = torch.export.Dim.DYNAMIC
BOTH = {0: DYNAMIC, 1: DYNAMIC}
# What depends on the input alone.
GATES = [
    *(gate for gate in EVERY_GATE if not (isinstance(gate, hw.RandomGate) and gate.per_input)),
    hw.GroupGate(hw.BudgetGate(keep=0.5)),
]
pytestmark = pytest.mark.filterwarnings("ignore:headwise. masked, not skipped:UserWarning")


class EveryGate(torch.nn.Module):
    """A layer with each gate."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            hw.MultiheadAttention(D, H, head_dim=4, batch_first=True, gate=lively_or_new(gate))
            for gate in GATES
        )
        hw.link_gates(self)
        self.eval()

    def forward(self, x, padding):  # [B, L, D], [B, L]
        return torch.stack(
            [own(x, x, x, key_padding_mask=padding, need_weights=False)[0] for own in self.layers]
        )


def lively_or_new(gate):
    return gate if isinstance(gate, hw.GroupGate) else lively(gate)


def operators(program):
    nodes = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {str(target) for target in nodes}


def test_every_gate_as_plain_operators_with_dynamic_shapes():
    torch.manual_seed(0)
    model = EveryGate()
    x, padding = torch.randn(3, 6, D), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    program = plain_program(model, (x, padding), dynamic_shapes=(BOTH, BOTH))
    assert not any("headwise" in name for name in operators(program))
    assert all(layer._probe is None for layer in model.layers)
    hidden = torch.zeros(4, 9, dtype=torch.bool)
    hidden[1, 2:] = hidden[2] = True  # one sequence is all padding
    x = torch.randn(4, 9, D)
    with torch.no_grad(), hw.trace(model) as trace:
        expected = model(x, hidden)
        found = program.module()(x, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counts = torch.stack([selection.count for selection in trace.selections.values()])
    assert (counts < H).any() and len(counts) == len(GATES)  # heads were skipped by the model


@pytest.mark.parametrize("heads", range(7))
def test_selections_by_comparisons_equal_the_operators(heads):
    torch.manual_seed(heads)
    relevance = torch.randint(-2, 3, (40, heads)).float()  # ties
    count = torch.randint(heads + 1, (40,), dtype=torch.int32)
    index = torch.ops.headwise.select_heads(relevance, count)
    assert torch.equal(export._select_heads(relevance, count), index)
    mask = torch.ops.headwise.selection_mask(index, count, torch.float32)
    assert torch.equal(export._selection_mask(index, count, torch.float32), mask)


@pytest.mark.parametrize("gate", [None, hw.BudgetGate(keep=0.5)], ids=["pruned", "gated"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_models_with_padding(name, gate):
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    model = hw.convert(row.build(), gate)
    if gate is None:
        model = hw.prune_heads(model, {0: [1], 1: [0, 2]})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".gate." in key:
                parameter.normal_()
    inputs = row.inputs()
    shapes = dict.fromkeys(inputs, BOTH)
    if name.startswith("Llama"):
        inputs["attention_mask"][0, :3] = 0  # padding before the text: queries that see no key
        inputs, shapes = {**inputs, "use_cache": False}, {**shapes, "use_cache": None}
    program = plain_program(model, kwargs=inputs, dynamic_shapes=shapes)
    assert not any("headwise" in name for name in operators(program))
    given = {k: v[:2, :6] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        expected, found = model(**given).logits, program.module()(**given).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Without kernels that give zeros for such queries, as in ONNX, nothing is NaN either.
    if name.startswith("Llama"):
        assert not any("scaled_dot_product" in name for name in operators(program))


def test_what_runs_is_told():
    gated = hw.convert(bert("BertModel"), hw.BudgetGate(keep=0.5))
    assert export.note(gated) == (
        "headwise: masked, not skipped: all 8 attention heads in 2 layers run for every input, and "
        "BudgetGate only multiplies their outputs; the choice saves no time in this program"
    )
    inputs = ARCHITECTURES["BertModel"].inputs()
    with pytest.warns(UserWarning, match="masked, not skipped: all 8 attention heads"):
        plain_program(gated, kwargs=inputs)
    small = hw.prune_heads(hw.convert(bert("BertModel")), {0: [1]})
    assert export.note(small) == "headwise: 7 attention heads in 2 layers, all of them run"


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match=r"call headwise\.convert\(model\) first"):
        plain_program(bert("BertModel"))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        plain_program(hw.convert(bert("BertModel")).train())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        plain_program(3)
