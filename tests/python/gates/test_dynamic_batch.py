"""No gate is compiled for one batch size."""

import headwise as hw
import pytest
import torch
from support.gates import EVERY_GATE, D, H
from torch._dynamo.testing import CompileCounter

GATES = [*EVERY_GATE, hw.GroupGate(hw.BudgetGate()), hw.ThresholdGate(0.1, block_ratio=0.2)]
GATES = [gate for gate in GATES if not isinstance(gate, hw.RandomGate)]


def layer_of(gate):
    torch.manual_seed(0)
    return hw.link_gates(
        hw.MultiheadAttention(D, H, head_dim=4, gate=gate, batch_first=True)
    ).eval()


# SleepGate counts steps on the host in training.
CASES = [(gate, False) for gate in GATES]
CASES += [(gate, True) for gate in GATES if not isinstance(gate, hw.SleepGate)]


@pytest.mark.parametrize("gate, training", CASES, ids=lambda value: type(value).__name__)
def test_one_graph_for_all_batch_sizes(gate, training):
    layer = layer_of(gate).train(training)
    counter = CompileCounter()
    torch._dynamo.reset()

    @torch.compile(dynamic=True, backend=counter)
    def run(x):
        return layer(x, x, x, need_weights=False)[0]

    for batch in (7, 3, 5, 12, 2):
        x = torch.randn(batch, 4, D)
        torch.manual_seed(1)
        got = run(x)
        assert got.shape == x.shape
    # A gate of scope "model" notes which layers have drawn: one more for the second forward.
    assert counter.frame_count <= (2 if training else 1)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_export_with_a_dynamic_batch(gate):
    layer = layer_of(gate)

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x, need_weights=False)[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Run(), (torch.randn(6, 4, D),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 5, 33):
        x = torch.randn(size, 4, D)
        with torch.no_grad():
            expected = layer(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(program.module()(x), expected)
