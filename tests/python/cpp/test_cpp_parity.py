"""headwise::MultiheadAttention (C++) and headwise.MultiheadAttention give the same numbers."""

import headwise as hw
import pytest
import torch
from support.programs import (
    assert_written,
    differentiated,
    drop_state,
    find_program,
    random_layer,
    run_program,
    write_layer,
)

D, H = 24, 4


PROGRAM = find_program("layer_parity")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="tests/cpp is not built")

GATES = {
    "none": None,
    "fixed": hw.FixedGate(scale=[0.5, 0.0, 1.0, 2.0]),
    "random": hw.RandomGate(0.5),
    "budget": hw.BudgetGate(entropy_strength=0.1),
    "budget_straight": hw.BudgetGate(
        relaxation="straight_through", kept_weight="soft", noise="normal", rounding="ceil"
    ),
    "budget_fixed": hw.BudgetGate(budget=0.5, execution="selected"),
    "hard_concrete": hw.HardConcreteGate(),
    "hard_concrete_input": hw.HardConcreteGate(input_dependent=True, penalty="lagrangian"),
    "subset": hw.SubsetGate(2, temperature=2.0),
    "subset_straight": hw.SubsetGate(scope="layer", estimator="straight_through"),
    "requested": hw.RequestedBudgetGate(0.6, execution="selected"),
    "requested_layer": hw.RequestedBudgetGate(0.3, scope="layer", min_heads=1),
    "gumbel_sigmoid": hw.GumbelSigmoidGate(0.3),
    "adavit": hw.GumbelSigmoidGate(0.3, penalty="adavit"),
    "sleep": hw.SleepGate(0.5),
    "threshold": hw.ThresholdGate(3.0),
    "threshold_blocks": hw.ThresholdGate(
        1.0, normalize=False, block=3, block_ratio=0.2, approximate=True, resolution=2.0
    ),
    "shared": hw.SharedHeadsGate(hw.BudgetGate(0.4), shared=[2]),
    "hard_concrete_one": hw.HardConcreteGate(input_dependent=True, kept_weight="one"),
}
LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True, "bias": False},
    "added_keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other_widths": {"kdim": 10, "vdim": 14, "batch_first": True},
    "narrow": {"head_dim": 5, "batch_first": True, "dropout": 0.25},
}
DEFAULTS = {
    "dropout": 0.0,
    "bias": True,
    "add_bias_kv": False,
    "add_zero_attn": False,
    "kdim": None,
    "vdim": None,
    "batch_first": False,
    "head_dim": None,
}


def compare(tmp_path, layer, gate, training, progress, *, is_causal=False, average=True):
    options = {**DEFAULTS, **LAYERS[layer]}
    torch.manual_seed(0)
    ours = hw.MultiheadAttention(D, H, **options, gate=GATES[gate], dtype=torch.float64)
    ours = random_layer(ours, progress).train(training)
    cross = options["kdim"] is not None
    shapes = {"query": (3, 5, D)}
    if cross:
        shapes |= {"key": (3, 7, options["kdim"]), "value": (3, 7, options["vdim"])}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    if not options["batch_first"]:
        inputs = {name: x.transpose(0, 1).contiguous() for name, x in inputs.items()}
    keys = 7 if cross else 5
    padding = torch.zeros(3, keys, dtype=torch.bool)
    padding[1, 3:] = True
    inputs["key_padding_mask"] = padding
    inputs["attn_mask"] = torch.ones(5, keys, dtype=torch.bool).triu(1)
    inputs["cotangent"] = torch.randn_like(inputs["query"])
    call = {
        "training": training,
        "seed": 11,
        "is_causal": is_causal,
        "average_attn_weights": average,
    }
    write_layer(tmp_path, ours, inputs, **options, call=call)

    # Python after the description is written: a training forward moves the running statistics.
    query = inputs["query"].clone().requires_grad_()
    key, value = (inputs["key"], inputs["value"]) if cross else (query, query)
    chosen = []
    if gate != "none":
        ours.gate.register_forward_hook(lambda m, a, selection: chosen.append(selection))
    if gate == "none" and training:
        ours._probe = lambda module, probe: None  # headwise's own path: the same dropout draws
    torch.manual_seed(11)
    output, weights = ours(
        query,
        key,
        value,
        key_padding_mask=padding,
        attn_mask=inputs["attn_mask"],
        average_attn_weights=average,
        is_causal=is_causal,
    )
    found = differentiated(
        ours, output, weights, inputs["cotangent"], chosen[-1] if chosen else None
    )
    expected = {
        **found,
        "grad_query": query.grad,
        **{f"buffer.{n}": b for n, b in ours.named_buffers() if n in ours.state_dict()},
    }
    run_program(PROGRAM, tmp_path)
    assert_written(tmp_path, expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("training", "progress"), [(True, 0.5), (True, 1.0), (False, 1.0)])
def test_gates(tmp_path, gate, training, progress):
    compare(tmp_path, "batch_first", gate, training, progress, average=training)


@pytest.mark.parametrize("gate", ["none", "budget"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(tmp_path, layer, gate):
    compare(tmp_path, layer, gate, True, 0.8, is_causal=layer == "plain")


def test_names_of_parameters(tmp_path):
    """The program refuses a state that is not, name by name, the layer's."""
    compare(tmp_path, "plain", "budget", False, 1.0)
    drop_state(tmp_path, "gate.base")
    assert "tensors, the file" in run_program(PROGRAM, tmp_path, status=1)
