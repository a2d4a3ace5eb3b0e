"""A conversion proves itself, and is atomic."""

import copy
import logging

import headwise as hw
import pytest
import torch
from headwise.convert import Architecture, register_architecture, registry
from headwise.nn.proof import Draw, bare, unchanged_on_error
from support.architectures import ARCHITECTURES, EMBED, HEADS
from support.logs import own_messages
from torch import nn

transformers = pytest.importorskip("transformers")

BUILDS = {name: row.build for name, row in ARCHITECTURES.items()}


@pytest.fixture(params=BUILDS, ids=str)
def model(request):
    torch.manual_seed(0)
    return BUILDS[request.param]()


def snapshot(model):
    """Everything that a failed change must leave as it was, by the objects' own identity."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    parts = {
        name: (
            id(part),
            type(part),
            {k: id(v) for k, v in vars(part).items()},
            {k: id(v) for d in (part._modules, part._parameters, part._buffers)
             for k, v in d.items()},
            {k: list(v) for k, v in vars(part).items() if "hooks" in k and v},
        )
        for name, part in model.named_modules(remove_duplicate=False)
    }  # fmt: skip
    return parts, tensors


def same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


class FailsLate(nn.Module):
    """A function of name and layer that gives all but the last layer a gate, and then raises."""

    def __init__(self, layers, error):
        super().__init__()
        self.left, self.error = layers, error

    def forward(self, name, layer):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return hw.FixedGate([0])


FAILURES = {
    "a class": lambda n: hw.BudgetGate,
    "a function that raises": lambda n: FailsLate(n, KeyError("no gate for this layer")),
    "a function that is interrupted": lambda n: FailsLate(n, KeyboardInterrupt()),
    "a function that returns no gate": lambda n: lambda name, layer: "gate",
    "a gate of other sizes": lambda n: (
        lambda name, layer: hw.FixedGate([0], embed_dim=EMBED + 4, num_heads=HEADS + 1)
    ),
    "a head that is not there": lambda n: hw.FixedGate([HEADS + 3]),
    "a function that returns a class": lambda n: lambda name, layer: hw.FixedGate,
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failed_conversion_changes_nothing(model, failure):
    layers = len(hw.attention_layers(hw.convert(copy.deepcopy(model))))
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError, KeyError, KeyboardInterrupt)):
        hw.convert(model, failure(layers))
    same(before, snapshot(model))
    assert not hw.attention_layers(model)
    hw.convert(model)  # and the next one works


def test_a_failed_change_of_gates_changes_nothing():
    model = hw.convert(BUILDS["BertModel"](), hw.FixedGate([1]))
    before = snapshot(model)
    with pytest.raises(KeyError):
        hw.convert(model, FailsLate(2, KeyError("x")))
    with pytest.raises(ValueError, match="keep_selection is for decoders"):
        hw.convert(model, hw.RandomGate(), keep_selection=True)
    same(before, snapshot(model))


def test_a_class_is_named():
    with pytest.raises(TypeError, match="gate must be a gate or a function, got the class Budget"):
        hw.convert(nn.MultiheadAttention(8, 2), hw.BudgetGate)


def test_undoing_reaches_into_dictionaries_and_keeps_handles_alive():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError), unchanged_on_error(model):
        model[0].register_forward_pre_hook(lambda *_: calls.append(2))
        model[0]._forward_hooks.clear()
        model[0].extra = 1
        model[1] = nn.ReLU()
        raise RuntimeError
    model(torch.zeros(1, 2))
    assert calls == [1] and type(model[1]) is nn.Linear and not hasattr(model[0], "extra")
    handle.remove()
    model(torch.zeros(1, 2))
    assert calls == [1]


# --- what is verified ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [None, hw.FixedGate([0, 2]), hw.RandomGate(keep=0.5)], ids=str)
def test_conversions_in_every_dtype_prove_themselves(model, dtype, gate):
    state = torch.get_rng_state()
    hw.convert(model.to(dtype), gate)
    assert torch.equal(state, torch.get_rng_state()) or isinstance(gate, hw.Gate)


def test_trained_weights_with_large_scores_prove_themselves(model):
    """Rounding is no difference, however large the scores are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30.0 if parameter.dim() > 1 else 1.0)
    hw.convert(copy.deepcopy(model).bfloat16())
    hw.convert(model)


def broken(name):
    """A model whose attention does not compute what its class did when it was written."""
    model = BUILDS[name]()
    gpt2 = transformers.models.gpt2.modeling_gpt2.GPT2Attention  # before 5.4 it has no 'scaling'
    parts = [part for part in model.modules() if hasattr(part, "scaling") or type(part) is gpt2]
    return model, parts[-1]


@pytest.mark.parametrize(
    "name", ["BertModel", "AlbertModel", "ViTForImageClassification", "RobertaForSequence"
             "Classification", "DistilBertForSequenceClassification"]
)  # fmt: skip
def test_another_scale_is_noticed(name):
    model, part = broken(name)
    part.scaling *= 3.0
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"would not compute what it did: .* before and .* after"):
        hw.convert(model)
    same(before, snapshot(model))
    hw.convert(model, verify=False)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"])
def test_a_patched_forward_is_noticed(name, monkeypatch):
    model, part = broken(name)
    kind = type(part)
    original = kind.forward

    def patched(self, hidden_states, *args, **kwargs):
        output, *rest = original(self, hidden_states, *args, **kwargs)
        return (output + 0.1 * hidden_states, *rest)

    monkeypatch.setattr(kind, "forward", patched)
    with pytest.raises(ValueError, match="would not compute what it did"):
        hw.convert(model)
    assert not hw.attention_layers(model)


def test_an_implementation_of_ones_own_is_refused():
    from transformers import AttentionInterface

    def tempered(module, query, key, value, mask, **options):
        y = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.1)
        return y.transpose(1, 2).contiguous(), None

    AttentionInterface.register("tempered", tempered)
    model = BUILDS["BertModel"]()
    model.config._attn_implementation = "tempered"
    with pytest.raises(ValueError, match="its implementation 'tempered' is none that is known"):
        hw.convert(model)


def test_one_layer_of_each_kind_is_run(monkeypatch):
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    model.layers[3].self_attn = nn.MultiheadAttention(EMBED, 2, batch_first=True).eval()
    calls = []
    forward = nn.MultiheadAttention.forward
    monkeypatch.setattr(
        nn.MultiheadAttention,
        "forward",
        lambda self, *args, **kwargs: (
            calls.append((type(self).__name__, self.num_heads)),
            forward(self, *args, **kwargs),
        )[1],
    )
    hw.convert(model)
    assert {heads for _, heads in calls} == {2, HEADS}
    assert len(calls) == 2 * (3 + 3)  # of each kind three calls before, three after


def test_hooks_do_not_see_the_made_up_tokens():
    model = BUILDS["TransformerEncoder"]()
    calls = []
    for part in model.modules():
        part.register_forward_hook(lambda *_: calls.append(1))
    hw.convert(model)
    assert not calls


def test_a_model_on_the_meta_device_is_converted_unverified(caplog):
    with torch.device("meta"):
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with caplog.at_level(logging.INFO, "headwise.convert"):
        hw.convert(model)
    assert own_messages(caplog) == [
        "converted 1 MultiheadAttention; verified 0 kinds; not verified: 0"
    ]


def test_the_log_tells_what_was_converted_and_what_was_not(caplog):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4), Mixer()])
    with pytest.raises(ValueError, match="no conversion is known for .*Mixer"):
        hw.convert(model)
    with caplog.at_level(logging.INFO, "headwise.convert"):
        hw.convert(model, strict=False)
    first, second = own_messages(caplog)
    assert first == "converted 2 MultiheadAttention; verified 2 kinds"
    assert second.startswith("left 1 Mixer alone: no conversion is known for")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_a_registered_architecture_that_computes_something_else_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value, **kwargs):
            y, w = super().forward(query, key, value, **kwargs)
            return -y, w

    class Wrong(Architecture):
        name = "wrong"

        def refusal(self, module):
            return None

        def trial(self, module):
            return lambda own, draw: [own(*[draw(4, 2, 8)] * 3)[0]]

        def convert(self, module):
            mha = hw.MultiheadAttention(8, 2)
            mha.load_state_dict(module.state_dict())
            return mha, mha

    path = registry.class_path(Own)
    register_architecture(path, Wrong())
    try:
        model = nn.Sequential(Own(8, 2))
        with pytest.raises(ValueError, match="'0' .Own. would not compute what it did"):
            hw.convert(model)
        assert type(model[0]) is Own
    finally:
        del registry._REGISTERED[path]


def test_a_gate_that_does_something_else_is_refused():
    class Lies(hw.FixedGate):
        """Its index and its weights differ."""

        def forward(self, x, key_padding_mask=None):
            chosen = super().forward(x, key_padding_mask)
            return chosen._replace(weight=torch.ones_like(chosen.weight))

    with pytest.raises(ValueError, match="would not compute what it did"):
        hw.convert(BUILDS["BertModel"](), Lies([0]))


def llama(gate, **options):
    return hw.convert(BUILDS["LlamaForCausalLM"](), gate, **options)


def test_heads_of_a_group_that_run_apart_are_refused(monkeypatch):
    original = hw.GroupGate.forward

    def wrong(self, x, key_padding_mask=None):
        chosen = original(self, x, key_padding_mask)
        weight = chosen.weight.clone()
        weight[:, 1] *= 0.5
        return chosen._replace(weight=weight)

    monkeypatch.setattr(hw.GroupGate, "forward", wrong)
    model = BUILDS["LlamaForCausalLM"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match="heads 0 and 1 of group 0 have weights 1 and 0.5"):
        hw.convert(model, hw.GroupGate(hw.FixedGate([0])))
    same(before, snapshot(model))


def test_groups_are_those_of_the_layer():
    layer = next(iter(hw.attention_layers(llama(None)).values()))
    gate = hw.GroupGate(hw.FixedGate([0]), groups=[0, 1, 1, 1], embed_dim=EMBED, num_heads=HEADS)
    with pytest.raises(ValueError, match="head 1 is of group 0, got 1"):
        layer.set_gate(gate)


def test_a_selection_that_is_not_kept_is_refused(monkeypatch):
    from headwise.convert.kept_selection import LayerCacheOf

    keep = LayerCacheOf._keep

    def other(self, kept):
        keep(self, kept.moved(lambda tensor: tensor / 2 if tensor.is_floating_point() else tensor))

    model = llama(hw.FixedGate([0]))
    before = snapshot(model)
    monkeypatch.setattr(LayerCacheOf, "_keep", other)
    match = "keep_selection=True a weight is 1 at the prompt and 0.5 at the next step"
    with pytest.raises(ValueError, match=match):
        hw.convert(model, keep_selection=True)
    same(before, snapshot(model))


@pytest.mark.parametrize("keep_selection", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_cache_that_gives_other_keys_is_noticed(name, keep_selection, monkeypatch):
    from headwise.convert.kept_selection import LayerCacheOf

    update = LayerCacheOf.update

    def wrong(self, k, v):
        k, v = update(self, k, v)
        return k, v.roll(1, dims=2)

    gate = hw.FixedGate([0, 1])
    model = hw.convert(BUILDS[name]())
    monkeypatch.setattr(LayerCacheOf, "update", wrong)
    with pytest.raises(ValueError, match="with a cache, .* before and .* after"):
        hw.convert(model, gate, keep_selection=keep_selection)
    assert all(layer.gate is None for layer in hw.attention_layers(model).values())


@pytest.mark.parametrize("name", ["BertModel", "Qwen3ForCausalLM", "AlbertModel"])
def test_modules_of_several_dtypes_are_compared_in_float64(name, caplog):
    """Norms that stay in float32 beside weights in bfloat16, as for training with adapters."""

    def mixed():
        model = BUILDS[name]().bfloat16()
        for part in model.modules():
            if "Norm" in type(part).__name__:
                part.float()
        return model

    with caplog.at_level(logging.INFO, "headwise.convert"):
        hw.convert(mixed(), hw.FixedGate([0, 2]))
    assert "verified 1 kind" in caplog.text and "not verified" not in caplog.text
    model = mixed()
    [part for part in model.modules() if hasattr(part, "scaling")][-1].scaling *= 3.0
    if name != "Qwen3ForCausalLM":  # which reads it
        with pytest.raises(ValueError, match="would not compute what it did"):
            hw.convert(model)


# --- pruning ------------------------------------------------------------------------------------


def test_pruning_proves_itself_and_undoes_itself(model, monkeypatch):
    hw.convert(model)
    entries = [
        hw.pruning.LayerPlan(name, layer.num_heads, list(range(i % 3)), [0.5] * (i % 3))
        for i, (name, layer) in enumerate(hw.attention_layers(model).items())
    ]
    plan = hw.HeadPlan(entries, "test")
    hw.prune(model, plan)
    kind = type(next(iter(hw.attention_layers(model).values())))
    original = kind.pruned

    def wrong(self, entry):
        smaller = original(self, entry)
        with torch.no_grad():
            smaller.output_projection.weight.mul_(2.0)
            if smaller.output_projection.bias is not None:
                smaller.output_projection.bias.add_(1.0)
        return smaller

    monkeypatch.setattr(kind, "pruned", wrong)
    before = snapshot(model)
    if any(entry.heads for entry in entries) or entries and _has_bias(model):
        with pytest.raises(ValueError, match="would not compute what it did"):
            hw.prune(model, plan, inplace=True)
        same(before, snapshot(model))
    hw.prune(model, plan, verify=False)


def _has_bias(model):
    layers = hw.attention_layers(model).values()
    return all(layer.output_projection.bias is not None for layer in layers)


def test_a_bare_copy_shares_parameters_and_nothing_else():
    layer = hw.convert(nn.MultiheadAttention(8, 2), hw.FixedGate([0])).train()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer._observers.append(lambda *_: calls.append(2))
    copied = bare(layer)
    x = Draw(torch.float32, torch.device("cpu"))(3, 2, 8)
    torch.testing.assert_close(copied(x, x, x)[0], copy.deepcopy(layer).eval()(x, x, x)[0])
    assert copied.in_proj_weight is layer.in_proj_weight and not copied.training
    assert calls == [1] and layer.training
    copied.gate.scale.fill_(0.0)
    assert layer.gate.scale.any()
    double = bare(layer, torch.float64)
    assert double.in_proj_weight.dtype == torch.float64
    assert layer.in_proj_weight.dtype == torch.float32
