"""The faults that the checks for users' gates and architectures find."""

import headwise as hw
import pytest
import torch
from headwise.testing import check_architecture, check_gate, check_selection
from support.gates import D
from torch import nn


class Halves(hw.Gate):
    """Runs the first or the second half of the heads: which, depends on the sign of the input's
    mean."""

    def __init__(self, **sizes):
        super().__init__({}, **sizes)

    def _build(self, device, dtype):
        self.slope = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.register_buffer("seen", torch.zeros((), device=device))

    def relevance(self, x):
        sign = torch.where((x.mean((1, 2)) * self.slope) >= 0, 1.0, -1.0)[:, None]
        first = torch.arange(self.num_heads) < self.num_heads // 2
        return sign * torch.where(first, 1.0, -1.0)

    def forward(self, x, key_padding_mask=None):
        self._check_bound(x)
        weight = (self.relevance(x) > 0).to(x.dtype)
        index, count = torch.ops.headwise.select_nonzero(weight)
        return hw.Selection(index, count, weight)


class Descending(Halves):
    def forward(self, x, key_padding_mask=None):
        found = super().forward(x)
        index = torch.where(found.index >= 0, found.index.flip(1).sort(1, descending=True)[0], -1)
        return found._replace(index=index)


class WeighsAll(Halves):
    def forward(self, x, key_padding_mask=None):
        found = super().forward(x)
        return found._replace(weight=torch.ones_like(found.weight))


class Int64(Halves):
    def forward(self, x, key_padding_mask=None):
        found = super().forward(x)
        return found._replace(count=found.count.long())


class Counts(Halves):
    def forward(self, x, key_padding_mask=None):
        self.seen += 1
        return super().forward(x)


class CountsAgain(Halves):
    """A checkpointed forward runs twice."""

    def forward(self, x, key_padding_mask=None):
        if self.training:
            self.seen += 1
        return super().forward(x)


class Unsaved(Halves):
    def _build(self, device, dtype):
        super()._build(device, dtype)
        self.register_buffer("lost", torch.zeros(()), persistent=False)


class Outside(Halves):
    """Its state is no buffer."""

    moved = 0.0

    def forward(self, x, key_padding_mask=None):
        if self.training:
            self.moved = 1e6
        return super().forward(x + self.moved - 5e5)


class Forgets(Halves):
    def __init__(self, shift=0.0, **sizes):
        super().__init__(**sizes)
        self.shift = shift

    def config(self):
        return {"type": "Halves"}


class Diverges(Halves):
    def penalty(self):
        return self.slope * torch.inf


class Double(Halves):
    def forward(self, x, key_padding_mask=None):
        found = super().forward(x)
        return found._replace(weight=found.weight.double())


class Host(Halves):
    def forward(self, x, key_padding_mask=None):
        if float(x.detach().sum()) > 1e9:
            raise RuntimeError
        return super().forward(x)


def test_a_gate_that_does_what_it_must_passes():
    check_gate(Halves())
    check_gate(Halves)  # a function that makes one
    check_gate(Host(), compiles=False)


@pytest.mark.parametrize(
    "gate, message",
    [
        (Descending, "index of sequence 0 must begin with 3 ascending heads, got"),
        (WeighsAll, "weight of sequence 0 must be 0 for heads that it did not choose"),
        (Int64, "count must be int32, got torch.int64"),
        (Counts, "gate.seen, which evaluation must not change"),
        (CountsAgain, "gate.seen, with activation checkpointing"),
        (Unsaved, r"buffers must be saved in the state, \['lost'\] are not"),
        (Outside, r"of a gate with the same state_dict\(\)"),
        (Forgets, r"config\(\) must build a Forgets"),
        (Diverges, "the penalty .*"),
        (Double, "weight must have the dtype of x, torch.float32, got torch.float64"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_of_gates_are_named(gate, message):
    with pytest.raises(AssertionError, match=message):
        check_gate(gate(), compiles=False)


def test_what_is_no_prototype_is_refused():
    with pytest.raises(TypeError, match="gate must be a headwise.Gate, got int"):
        check_gate(lambda: 3)
    with pytest.raises(ValueError, match="gate must not be bound to a layer"):
        check_gate(Halves(embed_dim=D, num_heads=6))


def test_the_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    check_gate(hw.RandomGate(0.5), compiles=False)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"index": torch.tensor([[0, 2, 1]])}, "must be -1 behind its 2 heads"),
        ({"index": torch.tensor([[0, 3, -1]])}, "must begin with 2 ascending heads"),
        ({"count": torch.tensor([4])}, "count must be in 0..3, got 4"),
        ({"weight": torch.tensor([[1.0, 0.0, torch.nan]])}, "weight must be finite"),
        ({"weight": torch.ones(1, 2)}, r"weight must have shape \(1, 3\), got \(1, 2\)"),
    ],
)
def test_selections_that_are_none(change, message):
    found = hw.Selection(
        torch.tensor([[0, 2, -1]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([[1.0, 0.0, 1.0]]),
    )
    check_selection(found, 1, 3)
    change = {k: v.int() if not v.is_floating_point() else v for k, v in change.items()}
    with pytest.raises(AssertionError, match=message):
        check_selection(found._replace(**change), 1, 3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_model_whose_heads_all_matter_passes():
    torch.manual_seed(0)
    check_architecture(Model(), torch.randn(2, 3, 8))


def test_a_head_that_changes_nothing_is_named():
    model = Model()
    with torch.no_grad():
        model.attention.out_proj.weight[:, 2:4] = 0.0
    with pytest.raises(AssertionError, match="dropping head 1 of layer 'attention' must change"):
        check_architecture(model, torch.randn(2, 3, 8))


def test_an_output_that_differs_is_found():
    calls = []

    def drifting(model, x):
        calls.append(model)
        return model(x) + 0.01 * len(calls)

    with pytest.raises(AssertionError, match="the output of the converted model: Tensor-likes"):
        check_architecture(Model(), torch.randn(2, 3, 8), forward_fn=drifting)
