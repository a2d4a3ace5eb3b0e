"""``headwise::GroupedQueryAttention`` (C++) gives the numbers of Python's, and its folders."""

import json

import headwise as hw
import pytest
import torch
from safetensors.torch import load_file
from support.architectures import decoder_config
from support.programs import (
    assert_written,
    differentiated,
    drop_state,
    find_program,
    random_layer,
    run_program,
    write_layer,
)

D, H, B, L = 24, 6, 3, 7
ENDS = [4, 5, 7]  # the prompt, one token, and two at once

PROGRAM = find_program("decoder_parity")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="tests/cpp is not built")

GATES = {
    "none": None,
    "fixed": hw.FixedGate(scale=[0.5, 0.0, 1.0, 2.0, 0.0, 0.0]),
    "budget": hw.BudgetGate(entropy_strength=0.1),
    "selected": hw.BudgetGate(budget=0.5, execution="selected"),
    "groups": hw.GroupGate(hw.BudgetGate(keep=0.5)),
    "groups_selected": hw.GroupGate(hw.BudgetGate(budget=0.4, execution="selected")),
    "shared": hw.SharedHeadsGate(hw.BudgetGate(0.4, execution="selected"), shared=[2]),
    "requested": hw.RequestedBudgetGate(0.4, execution="selected"),
}
LAYERS = {
    "plain": {"num_key_value_heads": 3},
    "bias": {"num_key_value_heads": 2, "bias": True, "output_bias": False},
    "kept": {"num_key_value_heads": 3, "keep_selection": True},
    "qwen3": {"num_key_value_heads": 3, "head_dim": 6, "qk_norm_eps": 1e-5, "keep_selection": True},
    "window": {"num_key_value_heads": 2, "sliding_window": 3, "scale": 0.3},
    "multi_head": {"keep_selection": True},
    "uneven": {
        "num_key_value_heads": 3,
        "key_value_heads": [0, 0, 0, 1, 2, 2],
        "keep_selection": True,
    },
    "dropout": {"num_key_value_heads": 3, "dropout": 0.25},
}
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "dropout": 0.0,
    "bias": False,
    "output_bias": None,
    "scale": None,
    "qk_norm_eps": None,
    "sliding_window": None,
    "key_value_heads": None,
    "keep_selection": False,
}


def rope(width):
    angle = torch.arange(L, dtype=torch.float64)[:, None] / 50 ** (torch.arange(width // 2) / width)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return {"cos": angle.cos().contiguous(), "sin": angle.sin().contiguous()}


def compare(tmp_path, layer, gate, training, *, masked=False, padded=False, seen=None, heads=None):
    options = {**DEFAULTS, **LAYERS[layer]}
    torch.manual_seed(0)
    ours = hw.GroupedQueryAttention(D, H, **options, gate=GATES[gate], dtype=torch.float64)
    ours = random_layer(ours, 0.8)
    inputs = {"x": torch.randn(B, L, D, dtype=torch.float64), **rope(4)}
    inputs["cotangent"] = torch.randn_like(inputs["x"])
    if masked:
        inputs["attn_mask"] = torch.randn(B, H, L, L, dtype=torch.float64)
    if padded:
        padding = torch.zeros(B, L, dtype=torch.bool)
        padding[1, :2] = True
        inputs["key_padding_mask"] = padding
    if seen is not None:
        inputs["seen"] = seen
    scale = None if heads is None else [0.5 + i for i in range(len(heads))]
    call = {"training": training, "seed": 11, "ends": ENDS, "heads": heads, "scale": scale}
    if heads is not None and masked:
        inputs["attn_mask"] = inputs["attn_mask"][:, heads]
    write_layer(tmp_path, ours, inputs, **options, call=call)
    if heads is not None:
        ours = hw.prune(ours, hw.HeadPlan([hw.pruning.LayerPlan("", H, heads, scale)]))
    chosen = []
    ours._observers.append(lambda layer, selection, x, padding: chosen.append(selection))
    expected = cached_steps(ours.eval(), inputs)
    if chosen:
        expected["counts"] = torch.stack([selection.count for selection in chosen], 1)

    ours.train(training)
    x = inputs["x"].clone().requires_grad_()
    torch.manual_seed(11)
    number = seen is not None and seen.dim() == 0
    with (
        hw.gates_see(ours, int(seen) if number else seen)
        if seen is not None
        else torch.enable_grad()
    ):
        output, weights = ours(
            x,
            (inputs["cos"], inputs["sin"]),
            key_padding_mask=inputs.get("key_padding_mask"),
            attn_mask=inputs.get("attn_mask"),
            need_weights=True,
        )
    selection = chosen[-1] if chosen else None
    expected |= differentiated(ours, output, weights, inputs["cotangent"], selection)
    expected["grad_x"] = torch.zeros_like(x) if x.grad is None else x.grad
    run(tmp_path)
    return assert_written(tmp_path, expected)


def cached_steps(layer, inputs):
    """The outputs of the prompt and of each later token, and what the cache holds."""
    cache, steps, begin = hw.KeyValueCache(), [], 0
    with torch.no_grad():
        for end in ENDS:
            padding = inputs.get("key_padding_mask")
            y, _ = layer(
                inputs["x"][:, begin:end],
                (inputs["cos"][:, begin:end], inputs["sin"][:, begin:end]),
                key_padding_mask=None if padding is None else padding[:, :end],
                cache=cache,
            )
            steps.append(y)
            begin = end
    slots = {} if cache.slots is None else {"slots": cache.slots}
    return {"steps": torch.cat(steps, 1), "k": cache.k, "v": cache.v, **slots}


def run(*arguments, status=0):
    return run_program(PROGRAM, *arguments, status=status)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_gates(tmp_path, gate, training):
    compare(tmp_path, "plain", gate, training)


@pytest.mark.parametrize("gate", ["none", "selected"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(tmp_path, layer, gate):
    compare(tmp_path, layer, gate, training=layer == "dropout" and gate == "selected", padded=True)


def test_a_cache_of_chosen_groups(tmp_path):
    got = compare(tmp_path, "kept", "groups_selected", training=False)
    assert got["k"].shape == (B, 1, L, D // H) and got["slots"].shape == (B, 1)
    assert len(got["slots"].unique()) > 1, "no two sequences differ"


@pytest.mark.parametrize("layer", ["kept", "uneven"])
def test_a_mask_for_each_head(tmp_path, layer):
    compare(tmp_path, layer, "groups_selected", training=False, masked=True, padded=True)


@pytest.mark.parametrize("seen", [torch.tensor(3), torch.arange(L).expand(B, L) < 4])
def test_gates_see(tmp_path, seen):
    compare(tmp_path, "plain", "budget", training=True, padded=True, seen=seen.contiguous())


@pytest.mark.parametrize("window", range(1, L + 2))
def test_masks_of_several_tokens_behind_a_cache(tmp_path, window, monkeypatch):
    """C++ and Python have the rule of aligned masks each: they hide the same keys."""
    monkeypatch.setitem(LAYERS["window"], "sliding_window", window)
    compare(tmp_path, "window", "selected", training=False, masked=window % 2 == 0, padded=True)


#: Heads of whole groups of two; some of every group; groups of differing sizes; one; none.
KEPT = [[2, 3], [0, 1, 4, 5], [0, 2, 4], [1, 2, 3], [5], []]


@pytest.mark.parametrize("heads", KEPT, ids=str)
@pytest.mark.parametrize("layer", ["plain", "qwen3", "uneven", "bias"])
def test_pruned_layers(tmp_path, layer, heads):
    """Outputs, caches and gradients of a layer that C++ pruned are those of Python's."""
    compare(tmp_path, layer, "none", training=False, padded=True, masked=bool(heads), heads=heads)


def test_pruning_by_a_static_gate(tmp_path):
    compare(tmp_path, "plain", "fixed", training=False, heads=[0, 2, 3])


@pytest.mark.parametrize("prefix", ["Llama", "Qwen3", "Qwen2"])
@pytest.mark.parametrize("heads", [[2, 3], [0, 3, 4, 5, 6], []], ids=str)
def test_python_reads_what_cpp_pruned(tmp_path, prefix, heads):
    model = hw.convert(causal_model(prefix))
    names = list(hw.attention_layers(model))
    entries = [
        hw.pruning.LayerPlan(names[0], 8, heads, [0.5] * len(heads)),
        hw.pruning.LayerPlan(names[1], 8, list(range(8)), [1.0] * 8),
    ]
    plan = hw.HeadPlan(entries)
    plan.save(tmp_path / "plan.json")
    hw.save(model, tmp_path / "python")
    run(tmp_path / "python", tmp_path / "cpp", tmp_path / "plan.json")
    expected, again = hw.prune(model, plan), hw.load(tmp_path / "cpp")
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected(ids).logits, rtol=0, atol=0)
    hw.save(expected, tmp_path / "pruned")  # and C++ what Python pruned
    run(tmp_path / "pruned", tmp_path / "both")
    cpp, python = (
        json.loads((tmp_path / f / "headwise.json").read_text())["layers"] for f in ("cpp", "both")
    )
    assert cpp == python
    tensors, others = (load_file(str(tmp_path / f / "model.safetensors")) for f in ("cpp", "both"))
    assert sorted(tensors) == sorted(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_names_of_parameters(tmp_path):
    """The program refuses a state that is not, name by name, the layer's."""
    compare(tmp_path, "qwen3", "groups", False)
    drop_state(tmp_path, "gate.place")
    assert "tensors, the file" in run(tmp_path, status=1)


def causal_model(prefix):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {} if prefix in ("Cohere", "Olmo2") else {"head_dim": 4}
    config = decoder_config(prefix, **sizes)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


@pytest.mark.parametrize("prefix", ["Llama", "Qwen3", "Qwen2", "SmolLM3"])
def test_python_reads_what_cpp_saved(tmp_path, prefix):
    model = hw.convert(causal_model(prefix), hw.GroupGate(hw.BudgetGate(0.5)), keep_selection=True)
    hw.save(model, tmp_path / "python")
    run(tmp_path / "python", tmp_path / "cpp")
    again = hw.load(tmp_path / "cpp")
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    before, after = (
        json.loads((tmp_path / f / "headwise.json").read_text()) for f in ("python", "cpp")
    )
    assert after["layers"] == before["layers"] and after["architecture"] == before["architecture"]


@pytest.mark.parametrize("prefix", ["Gemma2", "Gemma3", "Cohere", "Olmo2"])
def test_what_only_python_can_run_is_refused(tmp_path, prefix):
    model = hw.convert(causal_model(prefix))
    hw.save(model, tmp_path / "python")
    layer = next(iter(hw.attention_layers(model).values()))
    message = run(tmp_path / "python", tmp_path / "cpp", status=1)
    expected = f"is a '{layer.variant}', which computes more than a GroupedQueryAttention"
    assert layer.variant and expected in message and message.count("\n") == 1
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        again = hw.load(tmp_path / "python")
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_gate_that_only_python_has_is_refused(tmp_path, routing):
    gate = hw.MixtureOfHeadsGate(0.5, routing=routing)
    if routing == "token":
        layer = hw.MultiheadAttention(D, H, gate=gate)
    else:
        layer = hw.GroupedQueryAttention(D, H, num_key_value_heads=3, gate=gate)
    hw.save(torch.nn.ModuleDict({"attention": layer}), tmp_path / "python")
    message = run(tmp_path / "python", tmp_path / "cpp", status=1)
    assert message.startswith("gate type must be one of BudgetGate, FixedGate, GroupGate, ")
    assert message.endswith(", got 'MixtureOfHeadsGate'\n") and message.count("\n") == 1
    assert not (tmp_path / "cpp").exists()
