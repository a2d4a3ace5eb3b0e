"""headwise.convert: equal outputs, every head under the gate's control, clear refusals."""

import ast
import copy
import importlib
import inspect
import pickle
import textwrap
import warnings

import headwise as hw
import pytest
import torch
from headwise.testing import check_architecture
from support.architectures import (
    ARCHITECTURES,
    EMBED,
    HEADS,
    bert,
    bert_config,
    bert_inputs,
    padding_mask,
    vit_attention,
)
from torch import nn

transformers = pytest.importorskip("transformers")

from headwise.convert import bert as bert_family  # noqa: E402
from headwise.convert import vit as vit_family  # noqa: E402

TRANSFORMERS = [name for name in ARCHITECTURES if not name.startswith(("Multihead", "Transformer"))]


@pytest.fixture(params=ARCHITECTURES.values(), ids=lambda row: row.name)
def architecture(request):
    torch.manual_seed(0)
    return request.param


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def full_gate(**kwargs):
    return hw.FixedGate(**kwargs)


def test_an_architecture_passes_its_checks(architecture):
    prompt = architecture.inputs()["input_ids"][:1] if architecture.generates else None
    check_architecture(
        architecture.build(), architecture.inputs(), forward_fn=architecture.run, prompt=prompt
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_maps_are_collected(name):
    row = ARCHITECTURES[name]
    original = row.build()
    original.set_attn_implementation("eager")
    converted = hw.convert(copy.deepcopy(original))
    inputs = row.inputs()
    with torch.no_grad():
        expected = original(**inputs, output_attentions=True).attentions
        actual = converted(**inputs, output_attentions=True).attentions
    assert len(actual) == len(expected) > 0
    valid = inputs.get("attention_mask", torch.ones(expected[0].shape[::3])).bool()  # [B, L]
    for own, maps in zip(actual, expected, strict=True):  # [B, H, L, L]
        close(own.transpose(1, 2)[valid], maps.transpose(1, 2)[valid])


def _statements(kind, prefix, other):
    """The code of a class as a tree, comments apart, with the names of another model in it."""
    lines = textwrap.dedent(inspect.getsource(kind)).replace(prefix, other)
    return ast.dump(ast.parse(lines))


_TWO_MODULES = ("SelfAttention", "Attention", "SelfOutput")


@pytest.mark.parametrize(
    "family, layouts",
    [(bert_family, {_TWO_MODULES}), (vit_family, {_TWO_MODULES, ("Attention",)})],
)
def test_a_family_has_the_same_attention(family, layouts):
    first = {}  # of each layout, older or newer
    assert len(family.FAMILY) == 8
    for prefix, path in family.FAMILY.items():
        module = importlib.import_module(path)
        parts = tuple(part for part in _TWO_MODULES if hasattr(module, prefix + part))
        assert parts in layouts
        first.setdefault(parts, (prefix, module))
        other, reference = first[parts]
        for part in parts:
            own, expected = getattr(module, prefix + part), getattr(reference, other + part)
            assert _statements(own, prefix, other) == _statements(expected, other, other)


def test_another_layout_of_a_known_class_is_refused():
    model = ARCHITECTURES["ViTForImageClassification"].build()
    place, (query, *_) = vit_attention()
    holder, _, name = f"{place}.{query}".rpartition(".")
    layer = model.get_submodule(holder)
    layer.other = getattr(layer, name)
    delattr(layer, name)
    with pytest.raises(ValueError, match=f"lays it out otherwise .*{name}"):
        hw.convert(model)


def test_prototype_serves_every_layer():
    model = ARCHITECTURES["TransformerEncoder"].build()
    prototype = hw.RandomGate(keep=0.5)
    hw.convert(model, prototype)
    gates = [layer.gate for layer in hw.attention_layers(model).values()]
    assert prototype.num_heads is None
    assert len({id(gate) for gate in gates}) == len(gates) == 2
    assert all(gate.num_heads == HEADS and gate.embed_dim == EMBED for gate in gates)
    assert not any(gate.training for gate in gates)


def test_gate_may_be_a_function_of_name_and_layer():
    model = ARCHITECTURES["TransformerDecoder"].build()
    seen = []

    def choose(name, layer):
        seen.append((name, layer.num_heads))
        return hw.FixedGate(heads=[0]) if name.endswith("self_attn") else None

    hw.convert(model, choose)
    layers = hw.attention_layers(model)
    assert [name for name, _ in seen] == list(layers)
    assert list(layers) == [
        "layers.0.self_attn",
        "layers.0.multihead_attn",
        "layers.1.self_attn",
        "layers.1.multihead_attn",
    ]
    assert [layer.gate is None for layer in layers.values()] == [False, True, False, True]


def test_keeps_parameters_hooks_mode_and_dtype():
    model = wrapper = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2).double()})
    attention = model["a"]
    attention.train(False)
    attention.out_proj.weight.requires_grad_(False)
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(attention.named_parameters())
    hw.convert(model, full_gate())
    assert model is wrapper
    for name, parameter in parameters.items():
        assert model["a"].get_parameter(name) is parameter
    assert not model["a"].training
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    model["a"](x, x, x)
    assert calls == [1]


def test_root_attention_is_replaced():
    attention = nn.MultiheadAttention(8, 2)
    converted = hw.convert(attention)
    assert isinstance(converted, hw.MultiheadAttention)
    assert converted.in_proj_weight is attention.in_proj_weight


def test_tied_modules_stay_tied():
    shared = nn.MultiheadAttention(8, 2)
    model = hw.convert(nn.ModuleList([shared, nn.Sequential(shared), nn.MultiheadAttention(8, 2)]))
    assert model[0] is model[1][0]
    assert list(hw.attention_layers(model)) == ["0", "2"]


def test_converting_again_keeps_gates_or_replaces_them():
    model = hw.convert(ARCHITECTURES["BertModel"].build(), hw.FixedGate(heads=[1]))
    layers = hw.attention_layers(model)
    hw.convert(model)
    assert hw.attention_layers(model) == layers
    assert all(layer.gate is not None for layer in layers.values())
    hw.convert(model, hw.RandomGate())
    assert all(isinstance(layer.gate, hw.RandomGate) for layer in layers.values())


def test_pickles(architecture):
    model = hw.convert(architecture.build(), hw.FixedGate(heads=[0, 2]))
    inputs = architecture.inputs()
    with torch.no_grad():
        expected = architecture.run(model, inputs)
        close(architecture.run(pickle.loads(pickle.dumps(model)), inputs), expected, 0.0)


# --- torch's encoder: fused kernels and nested tensors must not go around the gate ----------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_fast_path_calls_the_gate(mode, padded):
    torch.manual_seed(1)
    original = ARCHITECTURES["TransformerEncoder"].build()
    model = hw.convert(copy.deepcopy(original), full_gate())
    calls = []
    for layer in hw.attention_layers(model).values():
        layer.gate.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 7, EMBED)
    mask = padding_mask([7, 3, 5]) if padded else None
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's note that nested tensors are a prototype
        expected = original(x, src_key_padding_mask=mask)
        # Whole outputs: at padding torch's nested path writes zeros, and so does this one.
        close(model(x, src_key_padding_mask=mask), expected)
    assert len(calls) == 2


def test_encoder_takes_nested_input():
    torch.manual_seed(2)
    original = ARCHITECTURES["TransformerEncoder"].build().layers[0]
    model = hw.convert(copy.deepcopy(original), hw.FixedGate(heads=[0, 1, 2]))
    full = hw.convert(copy.deepcopy(original), full_gate())
    rows = [torch.randn(n, EMBED) for n in (4, 7)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(rows)
        for actual, row in zip(full(nested).unbind(), rows, strict=True):
            close(actual, original(row[None])[0])
        for actual, row in zip(model(nested).unbind(), rows, strict=True):
            close(actual, model(row[None])[0])


# --- BERT ---------------------------------------------------------------------------------------


def test_bert_gate_sees_padding():
    model = hw.convert(bert("BertModel"), full_gate())
    seen = []
    for layer in hw.attention_layers(model).values():
        layer._observers.append(lambda mha, selection, x, mask: seen.append(mask))
    inputs = bert_inputs()
    model(**inputs)
    assert len(seen) == 2
    for mask in seen:
        assert torch.equal(mask, inputs["attention_mask"] == 0)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("rows", ["extended", "full"])
def test_bert_masks_of_four_dimensions(form, rows):
    torch.manual_seed(3)
    original = bert("BertModel")
    model = hw.convert(copy.deepcopy(original), full_gate())
    ids = torch.randint(0, 50, (2, 6))
    if rows == "extended":
        may_attend = ~padding_mask([6, 4])[:, None, None, :]
    else:
        may_attend = (torch.rand(2, 1, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool)
        may_attend[1, :, :4, 4:] = False
    mask = may_attend
    if form == "float":
        mask = torch.zeros(may_attend.shape).masked_fill(
            ~may_attend, torch.finfo(torch.float32).min
        )
    expected = original(ids, attention_mask=mask.expand(2, 1, 6, 6))[0]
    # The extended mask goes to the encoder as it is, as code that calls layers directly does.
    hidden = model.embeddings(ids)
    close(model.encoder(hidden, attention_mask=mask).last_hidden_state, expected)
    close(model(ids, attention_mask=mask.expand(2, 1, 6, 6))[0], expected)


@pytest.mark.parametrize("gate", [None, full_gate()], ids=["no gate", "all heads"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_bert_sequence_of_nothing_but_padding_stays_finite(gate, grad):
    torch.manual_seed(6)
    original = bert("BertModel")
    model = hw.convert(copy.deepcopy(original), gate)
    inputs = bert_inputs()
    inputs["attention_mask"][1] = 0
    with torch.set_grad_enabled(grad):
        output = model(**inputs).last_hidden_state
        assert output.isfinite().all()
        close(output[0], original(**inputs).last_hidden_state[0])


def test_bert_output_attentions():
    torch.manual_seed(4)
    original = bert("BertForSequenceClassification", attn_implementation="eager")
    model = hw.convert(copy.deepcopy(original), full_gate())
    inputs = bert_inputs()
    keep = inputs["attention_mask"].bool()
    expected = original(**inputs, output_attentions=True).attentions
    actual = model(**inputs, output_attentions=True).attentions
    assert len(actual) == 2
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == (3, HEADS, 7, 7)
        close(a.transpose(1, 2)[keep], e.transpose(1, 2)[keep])
    assert model(**inputs).attentions is None
    for layer in hw.attention_layers(model).values():
        layer.gate.scale[1] = 0.0
    dropped = model(**inputs, output_attentions=True).attentions
    assert all((a[:, 1] == 0).all() and (a[:, 0] > 0).any() for a in dropped)


def test_bert_attentions_after_the_original_was_asked():
    # transformers puts its collecting hooks in at the first request.
    model = bert("BertModel", attn_implementation="eager")
    inputs = bert_inputs()
    model(**inputs, output_attentions=True)
    attentions = hw.convert(model)(**inputs, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(3, HEADS, 7, 7)] * 2


def test_bert_configuration_of_another_model_is_left_alone():
    config = bert_config()
    first, second = (transformers.BertModel(config).eval() for _ in range(2))
    inputs = bert_inputs()
    expected = second(**inputs)[0]
    hw.convert(first)
    close(second(**inputs)[0], expected, 0.0)
    assert first.config._attn_implementation == "headwise"
    assert second.config._attn_implementation != "headwise"


def test_bert_inside_a_module_of_ones_own():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = bert("BertModel")
            self.head = nn.Linear(EMBED, 2)

        def forward(self, **inputs):
            return self.head(self.encoder(**inputs).pooler_output)

    original = Classifier().eval()
    model = hw.convert(copy.deepcopy(original), full_gate())
    assert next(iter(hw.attention_layers(model))) == "encoder.encoder.layer.0.attention.self.mha"
    inputs = bert_inputs()
    close(model(**inputs), original(**inputs))


def test_bert_trains_and_checkpoints():
    model = hw.convert(bert("BertForSequenceClassification"), full_gate()).train()
    model.gradient_checkpointing_enable()
    inputs = bert_inputs()
    model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    for layer in hw.attention_layers(model).values():
        assert layer.in_proj_weight.grad.abs().sum() > 0


# --- refusals -----------------------------------------------------------------------------------


def test_refuses_with_the_list_of_what_it_found():
    model = transformers.BloomModel(transformers.BloomConfig(n_layer=2, hidden_size=8, n_head=2))
    with pytest.raises(ValueError) as error:
        hw.convert(model)
    assert str(error.value).splitlines() == [
        "model (BloomModel) has attention that headwise cannot convert (2 of 2 modules):",
        "  BloomAttention: no conversion is known for "
        "transformers.models.bloom.modeling_bloom.BloomAttention (if it is plain attention, "
        "describe it by adapters=)",
        "    h.0.self_attention",
        "    h.1.self_attention",
    ]


def test_refuses_a_decoder_and_changes_nothing():
    model = bert("BertModel", is_decoder=True, add_cross_attention=True, num_hidden_layers=1)
    before = list(model.modules())
    with pytest.raises(ValueError, match="belongs to a decoder") as error:
        hw.convert(model)
    assert "encoder.layer.0.crossattention" in str(error.value)
    assert list(model.modules()) == before


def test_refuses_subclasses_and_mixtures_unless_told():
    class Mine(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = nn.ModuleDict({"known": nn.MultiheadAttention(8, 2), "mine": Mine(8, 2)})
    with pytest.raises(ValueError, match="MultiheadAttention with its own forward may") as error:
        hw.convert(model)
    assert "(1 of 2 modules)" in str(error.value) and "strict=False" in str(error.value)
    assert type(model["known"]) is nn.MultiheadAttention
    hw.convert(model, strict=False)
    assert list(hw.attention_layers(model)) == ["known"]
    assert type(model["mine"]) is Mine


def test_refuses_replaced_and_tied_projections():
    model = bert("BertModel")
    model.encoder.layer[0].attention.self.query = nn.Sequential(nn.Linear(EMBED, EMBED))
    with pytest.raises(
        ValueError, match="its self.query was replaced by a torch.*Sequential .merge or remove"
    ):
        hw.convert(model)
    model = bert("BertModel")
    first, second = (layer.attention.self for layer in model.encoder.layer)
    first.key.weight = second.key.weight
    with pytest.raises(ValueError, match="it shares a parameter with another module"):
        hw.convert(model)


class Around(nn.Module):
    """What an adapter puts where a layer stood."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = getattr(base_layer, "weight", None)

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


@pytest.mark.parametrize("gate", [None, full_gate()], ids=["no gate", "all heads"])
def test_an_adapter_around_a_layer(gate):
    model = hw.convert(bert("BertModel"), gate).eval()
    inputs = bert_inputs()
    expected = model(**inputs).last_hidden_state
    attention = model.encoder.layer[0].attention.self
    attention.mha = Around(attention.mha)
    close(model(**inputs).last_hidden_state, expected)
    attention.mha = attention.mha.base_layer
    attention.mha.out_proj = Around(attention.mha.out_proj)
    with pytest.raises(TypeError, match="out_proj must be a torch.nn.Linear, .*Around"):
        model(**inputs)


def test_refuses_models_without_attention_and_bad_arguments():
    with pytest.raises(ValueError, match="Linear has neither torch.nn.MultiheadAttention nor"):
        hw.convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        hw.convert("bert")
    with pytest.raises(TypeError, match="gate must be a headwise.Gate, a function .* got int"):
        hw.convert(nn.MultiheadAttention(8, 2), 3)


def test_an_architecture_can_be_registered():
    from headwise.convert import Architecture, register_architecture, registry

    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.proj = nn.Linear(8, 8)

        def forward(self, x):  # [B, L, 8]
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    class Call(nn.Module):
        def __init__(self, mha):
            super().__init__()
            self.mha = mha

        def forward(self, x):
            return self.mha(x, x, x, need_weights=False)[0]

    class Own(Architecture):
        name = "own"

        def refusal(self, module):
            return None

        def convert(self, module):
            mha = hw.MultiheadAttention(8, 2, batch_first=True)
            mha.in_proj_weight, mha.in_proj_bias = module.qkv.weight, module.qkv.bias
            mha.out_proj.weight, mha.out_proj.bias = module.proj.weight, module.proj.bias
            return Call(mha), mha

    model = nn.Sequential(OwnAttention()).eval()
    x = torch.randn(2, 3, 8)
    expected = model(x)
    with pytest.raises(ValueError, match="no conversion is known"):
        hw.convert(model)
    path = registry.class_path(OwnAttention)
    register_architecture(path, Own())
    try:
        close(hw.convert(model, full_gate())(x), expected)
        assert list(hw.attention_layers(model)) == ["0.mha"]
    finally:
        del registry._REGISTERED[path]
