"""Hooks, computed weights, gradients, modes, buffers: carried over, or refused by name."""

import copy
import functools

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, EMBED, HEADS, vit_attention
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

transformers = pytest.importorskip("transformers")

# Where the attention is that a conversion replaces, and the projections in it.
PLACES = {
    "BertModel": ("encoder.layer.0.attention", ("self.query", "self.value", "output.dense")),
    "DistilBertForSequenceClassification": (
        "distilbert.transformer.layer.0.attention",
        ("q_lin", "k_lin", "out_lin"),
    ),
    "AlbertModel": (
        "encoder.albert_layer_groups.0.albert_layers.0.attention",
        ("query", "value", "dense"),
    ),
    "ViTForImageClassification": vit_attention(),
    "LlamaForCausalLM": ("model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "Qwen3ForCausalLM": ("model.layers.0.self_attn", ("q_proj", "v_proj", "o_proj")),
    "GPT2LMHeadModel": ("transformer.h.0.attn", ("c_attn", "c_proj")),
    "TransformerEncoder": ("layers.0.self_attn", ("out_proj",)),
}
KEPT = ("LlamaForCausalLM", "Qwen3ForCausalLM")  # whose projections stay the modules they were
PROJECTIONS = [(name, where) for name, (_, projections) in PLACES.items() for where in projections]


def build(name):
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    model = row.build()
    return model, row.inputs(), row.run, PLACES[name][0]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def unchanged(model, refused):
    """A refusal left no trace: no layer is converted, all parameters are the same objects."""
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match=refused):
        hw.convert(model)
    assert not hw.attention_layers(model)
    after = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert before == after


HOOKS = {
    "forward hook": lambda m, f: m.register_forward_hook(f),
    "forward pre-hook": lambda m, f: m.register_forward_pre_hook(f),
    "backward hook": lambda m, f: m.register_full_backward_hook(f),
    "backward pre-hook": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name, projection", PROJECTIONS)
def test_hooks_on_projections(name, projection, kind):
    """Called as before where the projection stays; elsewhere refused, by hook and projection."""
    model, inputs, run, place = build(name)
    calls = []

    def my_own_hook(module, *values):
        calls.append(len(values))

    HOOKS[kind](model.get_submodule(place).get_submodule(projection), my_own_hook)
    if name in KEPT:
        hw.convert(model, hw.FixedGate([0, 2]))
        run(model, inputs).sum().backward()
        assert len(calls) == 1
    elif name == "TransformerEncoder":  # torch reads the weight: never called, before or after
        run(model, inputs).sum().backward()
        hw.convert(model, hw.FixedGate([0, 2]))
        run(model, inputs).sum().backward()
        assert not calls
    else:
        unchanged(model, rf"its {projection} has a {kind} \(.*my_own_hook\) that would not be")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", [name for name in PLACES if name != "BertModel"])
def test_hooks_on_attention_fire_and_see_what_they_saw(name, kind):
    model, inputs, run, place = build(name)
    seen = []

    def hook(module, *values):
        tensors = [t for v in values for t in (v if isinstance(v, tuple) else (v,))]
        # The mask apart: a converted layer is handed the tokenizer's.
        seen.append([tuple(t.shape) for t in tensors if torch.is_tensor(t) and t.dim() == 3])

    handle = HOOKS[kind](model.get_submodule(place), hook)
    run(model, inputs).sum().backward()
    before, calls = seen[0], len(seen)
    seen.clear()
    hw.convert(model, hw.FixedGate())
    run(model, inputs).sum().backward()
    assert len(seen) == calls and seen[0] == before
    handle.remove()
    run(model, inputs).sum().backward()
    assert len(seen) == calls


def test_hooks_on_berts_attention():
    """Its self-attention returns what is projected already: hooks on that would see another
    thing."""
    for where in ("self", "output"):
        for kind, register in HOOKS.items():
            model, inputs, run, place = build("BertModel")
            part = model.get_submodule(f"{place}.{where}")
            register(part, lambda module, *values: None)
            if (where, kind) == ("self", "forward pre-hook"):
                hw.convert(model)
                assert model.get_submodule(f"{place}.self")._forward_pre_hooks
            else:
                unchanged(model, f"its {where} has a {kind} .* that would get")
    for register in HOOKS.values():
        model, inputs, run, place = build("BertModel")
        calls = []
        register(model.get_submodule(place), lambda module, *values: calls.append(1))  # noqa: B023
        hw.convert(model, hw.FixedGate())
        run(model, inputs).sum().backward()
        assert calls == [1]


def test_state_dict_hooks_are_refused_where_names_change():
    model, *_, place = build("DistilBertForSequenceClassification")
    model.get_submodule(place).register_state_dict_post_hook(lambda *_: None)
    unchanged(model, "its attention has a state_dict hook .* would see other names")
    model, *_, place = build("LlamaForCausalLM")
    calls = []
    model.get_submodule(place).register_state_dict_post_hook(lambda *_: calls.append(1))
    hw.convert(model).state_dict()
    assert calls


def test_a_full_backward_hook_leaves_the_gate_its_padding():
    """Such a hook hands on views: self-attention is known by the memory, not by the object."""
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(
        16, 4, batch_first=True, gate=hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0)
    ).eval()
    nn.init.normal_(layer.gate.relevance.weight, std=2.0)
    x = torch.randn(5, 8, 16, requires_grad=True)
    padding = torch.arange(8) >= torch.tensor([8, 4, 3, 6, 2])[:, None]

    def run():
        x.grad = None
        layer.zero_grad()
        y = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        (y[~padding] ** 2).sum().backward()
        return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    expected = run()
    grads = []
    layer.register_full_backward_hook(lambda module, before, after: grads.append(before))
    for actual, wanted in zip(run(), expected, strict=True):
        close(actual, wanted)
    # Query, key and value have gradients of their own, as PyTorch's layer gives them.
    assert len(grads[0]) == 3
    close(sum(grads[0]), expected[1])
    assert all(g.abs().max() > 0 for g in grads[0])
    with torch.no_grad():
        view = x.view_as(x)
        close(layer(x, view, x[:], key_padding_mask=padding)[0], expected[0])
        copy_ = x.clone()
        other = layer(x, copy_, copy_, key_padding_mask=padding)[0]
        assert (other - expected[0]).abs().max() > 1e-3  # other memory: what is padding is unknown


def test_a_detached_key_gets_no_gradient():
    layer = hw.MultiheadAttention(8, 2, batch_first=True, gate=hw.FixedGate()).eval()
    dense = copy.deepcopy(layer)
    dense.set_gate(None)
    for query, key in ((0, 1), (1, 0)):
        x = torch.randn(2, 5, 8, requires_grad=True)
        pair = (x, x.detach())
        gradients = [
            torch.autograd.grad(
                own(pair[query], pair[key], pair[key], need_weights=False)[0].square().sum(), x
            )[0]
            for own in (layer, dense)
        ]
        close(*gradients)


# --- weights that are computed -------------------------------------------------------------------

COMPUTED = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "parametrized weight_norm": lambda m: parametrizations.weight_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("name, projection", PROJECTIONS)
def test_computed_weights_are_refused_by_name(name, projection, kind):
    model, *_, place = build(name)
    COMPUTED[kind](model.get_submodule(place).get_submodule(projection))
    unchanged(model, f"{projection} (is computed from|was replaced by)")


def test_computed_weights_of_torchs_attention_are_refused_by_name():
    layer = nn.MultiheadAttention(8, 2)
    prune.random_unstructured(layer, "in_proj_weight", 0.5)
    unchanged(nn.Sequential(layer), "the in_proj_weight is computed from other parameters")
    layer = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(layer, "in_proj_weight", nn.Identity())
    unchanged(nn.Sequential(layer), "it holds 'parametrizations', which its class does not have")


def test_what_was_made_permanent_converts():
    for name, projection in PROJECTIONS:
        model, inputs, run, place = build(name)
        linear = model.get_submodule(place).get_submodule(projection)
        prune.l1_unstructured(linear, "weight", 0.5)
        prune.remove(linear, "weight")
        expected = run(model, inputs)
        close(run(hw.convert(model, hw.FixedGate()), inputs), expected)


def test_pruning_refuses_weights_that_are_computed_after_a_conversion():
    plan = hw.plan_from_gates(hw.convert(build("LlamaForCausalLM")[0], hw.FixedGate([0, 1])))
    model, *_ = build("LlamaForCausalLM")
    hw.convert(model)
    prune.l1_unstructured(next(iter(hw.attention_layers(model).values())).v_proj, "weight", 0.5)
    with pytest.raises(TypeError, match="v_proj must have its weight as a parameter"):
        hw.prune(model, plan, inplace=True)
    assert all(own.num_heads == HEADS for own in hw.attention_layers(model).values())


# --- parameters, modes, buffers ------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_gradients_and_what_is_trained_stay(name):
    model, inputs, run, place = build(name)
    run(model, inputs).square().sum().backward()
    reference = copy.deepcopy(model)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    hw.convert(model)
    before = sum(p.grad.square().sum() for p in reference.parameters() if p.grad is not None)
    after = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    close(after, before, 1e-4)
    assert all(p.is_leaf for p in model.parameters())
    frozen, *_ = build(name)
    frozen.requires_grad_(False)
    assert not any(p.requires_grad for p in hw.convert(frozen).parameters())


@pytest.mark.parametrize("name", PLACES)
def test_modes_of_parts_stay(name):
    model, *_, place = build(name)
    model.train()
    for part in model.modules():
        if isinstance(part, (nn.Dropout, nn.LayerNorm)):
            part.eval()
    kept = {id(part): part.training for part in model.modules()}
    hw.convert(model)
    for part in model.modules():
        assert part.training == kept.get(id(part), True)


@pytest.mark.parametrize("name", PLACES)
def test_what_the_class_does_not_hold_is_refused_by_name(name):
    for add in (
        lambda m: m.register_buffer("temperature", torch.ones(())),
        lambda m: m.register_parameter("temperature", nn.Parameter(torch.ones(()))),
        lambda m: m.register_module("temperature", nn.Linear(2, 2)),
    ):
        model, *_, place = build(name)
        add(model.get_submodule(place))
        unchanged(model, "it holds 'temperature'")


@pytest.mark.parametrize("name", PLACES)
def test_a_forward_of_the_instance_is_refused_by_name(name):
    for where in ("", PLACES[name][1][0]):
        model, *_, place = build(name)
        part = model.get_submodule(place)
        part = part.get_submodule(where) if where else part
        part.forward = functools.partial(part.forward)
        unchanged(model, "the forward.* was replaced on the instance")


@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_the_own_forward_on_the_instance_is_no_other(name):
    """transformers before 5.2 leaves it there after it collected a model's outputs."""
    model, inputs, run, _ = build(name)
    for part in model.modules():
        part.forward = part.forward
    with torch.no_grad():
        expected = run(model, inputs)
        converted = hw.convert(model, hw.FixedGate())
        torch.testing.assert_close(run(converted, inputs), expected, rtol=1e-5, atol=1e-5)
        for layer in hw.attention_layers(converted).values():
            layer.forward = layer.forward
            layer.gate.scale[0] = 0.0
        masked = run(converted, inputs)
        assert (masked - expected).abs().max() > 1e-4
        converted = hw.convert(converted, hw.FixedGate([1, 2, 3]))
        small = hw.prune(converted)
        torch.testing.assert_close(run(small, inputs), masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PLACES if name not in KEPT])
def test_hooks_on_gradients_of_copied_parameters_are_refused(name):
    if name == "TransformerEncoder":
        model, inputs, run, place = build(name)
        calls = []
        model.get_submodule(place).in_proj_weight.register_hook(lambda g: calls.append(1))
        run(hw.convert(model), inputs).sum().backward()
        assert calls == [1]
        return
    model, *_, place = build(name)
    model.get_submodule(f"{place}.{PLACES[name][1][0]}").weight.register_hook(lambda g: g)
    unchanged(model, "weight has a hook on its gradient, which would be lost")


@pytest.mark.parametrize("name", [name for name in PLACES if name != "TransformerEncoder"])
def test_weights_are_initialised_where_the_original_initialises_them(name):
    """``init_weights`` works on a converted model, and leaves what was loaded as it is."""
    model, *_ = build(name)
    hw.convert(model)
    fused = nn.MultiheadAttention(4, 2)  # some older models initialise only what they use
    nn.init.constant_(fused.in_proj_weight, 9.0)
    model._init_weights(fused)
    known = (fused.in_proj_weight != 9.0).all()
    for part in model.modules():
        part._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    model.init_weights()
    for where, parameter in model.named_parameters():
        if parameter.dim() > 1 and (known or not where.endswith("in_proj_weight")):
            assert (parameter != 9.0).all(), where


@pytest.mark.parametrize("name", [name for name in PLACES if name != "TransformerEncoder"])
def test_weights_that_were_loaded_are_not_initialised_again(name, tmp_path):
    original, inputs, run, _ = build(name)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path).eval()
    hw.convert(model)
    model.post_init()
    model.init_weights()
    close(run(model, inputs), run(original, inputs))


@pytest.mark.parametrize("name", ["BertModel", "DistilBertForSequenceClassification"])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (1, HEADS, 6, 6), (1, 1, 1, 6), (4, HEADS, 6, 6)])
def test_masks_for_all_sequences(name, shape, form):
    """As the originals take them, for a batch of four."""
    original, *_ = build(name)
    original = getattr(original, "distilbert", original)
    ids = torch.randint(0, 50, (4, 6))
    mask = (torch.rand(shape) > 0.4) | torch.eye(6, dtype=torch.bool)[-shape[2] :]
    if form == "float":
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(shape).masked_fill(~mask, lowest)
    expected = original(ids, attention_mask=mask.expand(4, -1, 6, 6))[0]
    for gate in (None, hw.FixedGate()):
        model = hw.convert(copy.deepcopy(original), gate)
        close(model(ids, attention_mask=mask.expand(-1, -1, 6, 6))[0], expected)
        layer = next(iter(hw.attention_layers(model).values()))
        seen = []
        layer._observers.append(lambda mha, selection, x, padding: seen.append(padding))  # noqa: B023
        model(ids, attention_mask=mask)
        assert gate is None or seen[0] is None or seen[0].shape == (4, 6)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_decoders_take_one_mask_for_all_sequences(name, heads):
    original, *_ = build(name)
    ids = torch.randint(3, 50, (4, 6))
    mask = ((torch.rand(1, heads, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool)).tril()
    expected = original(ids, attention_mask=mask).logits
    for gate in (None, hw.FixedGate()):
        close(hw.convert(copy.deepcopy(original), gate)(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("gate", [None, hw.FixedGate()])
def test_masks_of_four_dimensions_are_not_integers(name, gate):
    model = hw.convert(build(name)[0], gate)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.long).tril()
    layer = next(iter(hw.attention_layers(model).values()))
    replacement = layer if name == "LlamaForCausalLM" else model.encoder.layer[0].attention.self
    angles = {"position_embeddings": (torch.ones(2, 6, 6), torch.zeros(2, 6, 6))}
    options = angles if name == "LlamaForCausalLM" else {}
    with pytest.raises(TypeError, match="must be boolean or floating, got torch.int64"):
        replacement(torch.randn(2, 6, EMBED), attention_mask=mask, **options)


REFERENCES = {
    "itself": lambda attention: attention,
    "in a list": lambda attention: [nn.Identity(), attention],
    "in a dictionary": lambda attention: {"first": attention},
    "its forward": lambda attention: attention.forward,
    "part of it": lambda attention: next(m for m in attention.modules() if m is not attention),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (n, k)
        for n in PLACES
        for k in REFERENCES
        if k != "part of it" or n not in (*KEPT, "TransformerEncoder")
    ],
)
def test_other_references_to_what_is_replaced_are_refused_by_name(name, kind):
    """Whoever calls them would run the original, without the gate."""
    model, *_, place = build(name)
    place += ".self" if name == "BertModel" else ""  # the rest of it stays
    block = model.get_submodule(place.rpartition(".")[0])
    vars(block)["remembered"] = REFERENCES[kind](model.get_submodule(place))
    unchanged(model, "remembered' refers to the .* that is to be replaced")
    del vars(block)["remembered"]
    dense = hw.convert(model)
    layers = hw.attention_layers(dense)
    plan = hw.HeadPlan([hw.pruning.LayerPlan(n, v.num_heads, [0]) for n, v in layers.items()])
    vars(dense)["remembered"] = next(iter(layers.values())).forward
    with pytest.raises(ValueError, match="'remembered' refers to the "):
        hw.prune(dense, plan, inplace=True)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "TransformerEncoder"])
def test_attention_that_was_compiled_is_refused(name):
    model, *_, place = build(name)
    block, own = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    setattr(block, own, torch.compile(getattr(block, own)))
    unchanged(model, "compile modules, as by torch.compile, after converting and pruning")


def test_the_sizes_of_a_layer_are_those_of_its_weights():
    model, *_, place = build("LlamaForCausalLM")
    model.get_submodule(place).q_proj = nn.Linear(EMBED, EMBED + 1, bias=False)
    unchanged(model, "its projections are not as wide as whole heads of 6")


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
def test_pruning_refuses_a_layer_with_another_forward(name, structured):
    """accelerate wraps the forward of an instance; a smaller layer would run without it."""
    dense = hw.convert(build(name)[0])
    layers = hw.attention_layers(dense)
    plan = hw.HeadPlan([hw.pruning.LayerPlan(n, v.num_heads, [0]) for n, v in layers.items()])
    if structured:
        plan = hw.pruning.StructurePlan(plan)
    layer = next(iter(layers.values()))
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with pytest.raises(ValueError, match="another forward than its class"):
        hw.prune(dense, plan, inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    del layer.forward
    hw.prune(dense, plan, inplace=True)
