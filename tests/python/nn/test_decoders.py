"""Decoders: grouped heads, caches, generation, gates by step and by prompt, uneven groups."""

import ast
import copy
import importlib
import inspect
import json
import pickle
import textwrap

import headwise as hw
import pytest
import torch
from support.architectures import decoder_config
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from headwise.convert import llama as llama_family  # noqa: E402

VOCABULARY, EMBED, HEADS, GROUPS = 50, 24, 4, 2
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
FAMILY = {
    "Arcee": {},
    "Dots1": {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "EuroBert": {},
    "Gemma": {"head_dim": 8},
    "Granite": {"attention_multiplier": 0.3},
    "GraniteMoe": {**EXPERTS, "attention_multiplier": 0.3},
    "GraniteMoeShared": {**EXPERTS, "shared_intermediate_size": 16},
    "HyperCLOVAX": {},
    "Jais2": {},
    "Llama": {},
    "Mistral": {"sliding_window": 4, "head_dim": None},
    "Mixtral": {**EXPERTS, "head_dim": None},
    "Phimoe": EXPERTS,
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "shared_expert_intermediate_size": 16},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "head_dim": 8},
    "SolarOpen": {**ROUTED, "first_k_dense_replace": 1},
}  # fmt: skip
# HyperCLOVA X came with transformers 5.9.
INSTALLED = [prefix for prefix in FAMILY if hasattr(transformers, f"{prefix}Config")]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def build(prefix="Llama", kind="ForCausalLM", **kwargs):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": EMBED,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "intermediate_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if prefix == "GPT2":
        sizes.update(intermediate_size=None, n_inner=32)
    config = decoder_config(prefix, **{**sizes, **FAMILY.get(prefix, {}), **kwargs})
    kind = "ForMaskedLM" if prefix == "EuroBert" else kind
    kind = "LMHeadModel" if (prefix, kind) == ("GPT2", "ForCausalLM") else kind
    model = getattr(transformers, f"{prefix}{kind}")(config)
    with torch.no_grad():  # so that no head and no bias can be forgotten unnoticed
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)
    return model.eval()


def prompts():
    """Padded on the left."""
    torch.manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 6)) * mask, "attention_mask": mask}


def generate(model, tokens=5, **kwargs):
    kwargs = {"do_sample": False, **kwargs}
    return model.generate(**prompts(), max_new_tokens=tokens, min_new_tokens=tokens, **kwargs)


def layers_of(model):
    return hw.attention_layers(model).values()


# --- the layer ------------------------------------------------------------------------------------


def reference(layer, x, rope=None, weight=None, window=None, past=0):
    """Every head, its own key/value head, in plain lines: [B, S, D] -> [B, S - past, D]."""
    batch, length, _ = x.shape

    def heads(linear):
        return linear(x).view(batch, length, -1, layer.head_dim).transpose(1, 2)

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    if layer.q_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if rope is not None:
        cos, sin = (table[:, None] for table in rope)

        def rotate(t):
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        q, k = rotate(q), rotate(k)
    k, v = (t[:, layer.head_groups] for t in (k, v))
    scores = q @ k.transpose(2, 3) * layer.scale
    i, j = torch.arange(length)[:, None], torch.arange(length)
    unseen = j > i
    if window is not None:
        unseen = unseen | (j <= i - window)
    context = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ v  # [B, H, S, d]
    if weight is not None:
        context = context * weight[:, :, None, None]
    return layer.o_proj(context.transpose(1, 2).flatten(2))[:, past:]


def tables(length, width):
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


LAYERS = {
    "groups of 2": {},
    "multi-query, biases": {"num_key_value_heads": 1, "bias": True},
    "norms, scale": {"qk_norm_eps": 1e-6, "scale": 0.5, "output_bias": True},
    "uneven groups": {"key_value_heads": [0, 1, 1, 1]},
}


@pytest.mark.parametrize("gate", [None, hw.FixedGate(scale=[0.5, 0.0, 1.0, 2.0])], ids=["", "gate"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layer_equals_the_reference(options, gate):
    torch.manual_seed(0)
    options = {"num_key_value_heads": GROUPS, **options}
    layer = hw.GroupedQueryAttention(EMBED, HEADS, head_dim=8, gate=gate, **options).eval()
    x, rope = torch.randn(2, 7, EMBED), tables(7, 8)
    weight = None if gate is None else layer.gate.scale.expand(2, -1)
    expected = reference(layer, x, rope, weight)
    close(layer(x, rope)[0], expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for y in (layer(x, rope)[0], expected)
    ]
    for actual, wanted in zip(*gradients, strict=True):
        close(actual, wanted, 1e-4)
    # Token by token and in pieces, through a cache.
    for pieces in ([1] * 7, [4, 1, 2]):
        cache, start, rows = hw.KeyValueCache(), 0, []
        for piece in pieces:
            own = [table[:, start : start + piece] for table in rope]
            rows.append(layer(x[:, start : start + piece], tuple(own), cache=cache)[0])
            start += piece
        close(torch.cat(rows, 1), expected)
        assert len(cache) == 7


def test_layer_with_a_sliding_window():
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, GROUPS, sliding_window=3).eval()
    x = torch.randn(2, 6, EMBED)
    expected = reference(layer, x, window=3)
    close(layer(x)[0], expected)
    cache = hw.KeyValueCache()
    close(torch.cat([layer(token, cache=cache)[0] for token in x.split(1, 1)], 1), expected)


@pytest.mark.parametrize("gate", [None, hw.FixedGate(scale=[0.5, 0.0, 1.0, 2.0])], ids=["", "gate"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_cross_attention_equals_the_reference(groups, gate):
    torch.manual_seed(1)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, groups, bias=True, gate=gate).eval()
    x, memory = torch.randn(2, 5, EMBED), torch.randn(2, 7, EMBED)
    padding = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    q = layer.q_proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    k, v = (
        linear(memory).unflatten(2, (groups, -1)).transpose(1, 2)[:, layer.head_groups]
        for linear in (layer.k_proj, layer.v_proj)
    )
    scores = (q @ k.transpose(2, 3) * layer.scale).masked_fill(padding[:, None, None], -torch.inf)
    context = scores.softmax(-1) @ v
    if gate is not None:
        context = context * layer.gate.scale[:, None, None]
    expected = layer.o_proj(context.transpose(1, 2).flatten(2))
    masks = {"memory": memory, "key_padding_mask": padding, "is_causal": False}
    output, weights = layer(x, **masks, need_weights=True)
    close(output, expected)
    ran = torch.ones(4) if gate is None else (layer.gate.scale > 0).float()
    close(weights, scores.softmax(-1) * ran[:, None, None])
    found = [
        torch.autograd.grad(y.square().sum(), [*layer.parameters()]) for y in (output, expected)
    ]
    for own, wanted in zip(*found, strict=True):
        close(own, wanted, 1e-4)
    # Step by step: keys and values of the memory are projected in the first call alone.
    cache = hw.KeyValueCache()
    steps = [layer(x[:, :2], **masks, cache=cache)[0]]
    layer.k_proj = layer.v_proj = None
    steps += [layer(x[:, i : i + 1], **masks, cache=cache)[0] for i in range(2, 5)]
    close(torch.cat(steps, 1), expected)
    assert len(cache) == 7
    with pytest.raises(ValueError, match=r"memory must have shape \[2, S, 24\], got \[1, 7, 24\]"):
        layer(x, memory=memory[:1], is_causal=False)
    with pytest.raises(
        ValueError, match="is_causal must be False and position_embeddings None with"
    ):
        layer(x, memory=memory)


def test_layer_refuses_what_does_not_fit():
    for arguments, text in (
        ((EMBED, 4, 3), "num_key_value_heads must divide num_heads=4, got 3"),
        ((EMBED, 4, 0), "num_key_value_heads must be positive, got 0"),
        ((EMBED, 5), "num_heads must divide embed_dim=24"),
    ):
        with pytest.raises(ValueError, match=text):
            hw.GroupedQueryAttention(*arguments)
    with pytest.raises(ValueError, match="key_value_heads must name one of 2 key/value heads"):
        hw.GroupedQueryAttention(EMBED, 4, 2, key_value_heads=[0, 0, 0, 0])
    with pytest.raises(ValueError, match="key_value_heads must be ascending"):
        hw.GroupedQueryAttention(EMBED, 4, 2, key_value_heads=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="a ThresholdGate reads queries and keys"):
        hw.GroupedQueryAttention(EMBED, 4, 2, gate=hw.ThresholdGate(0.1))
    layer = hw.GroupedQueryAttention(EMBED, 4, 2)
    x = torch.randn(2, 5, EMBED)
    with pytest.raises(ValueError, match=r"x must have shape \[B, L, 24\], got \[2, 5, 23\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="cos of position_embeddings must have shape"):
        layer(x, tables(4, 6))
    with pytest.raises(
        ValueError, match="key_padding_mask must have 5 columns, one per key, got 4"
    ):
        layer(x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask must be boolean or floating, got torch.int64"):
        layer(x, attn_mask=torch.zeros(5, 5, dtype=torch.long))


# --- conversion ---------------------------------------------------------------------------------


class _SameAsLlama(ast.NodeTransformer):
    """Leaves out options without effect, and those that Llama lacks."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns, node.decorator_list, node.args.defaults = None, [], []
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        # Mistral and Qwen also pass the implementation the window that is in the mask.
        node.keywords = [word for word in node.keywords if word.arg != "sliding_window"]
        # Qwen3 normalises its queries and keys, as the layer then does.
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("q_norm", "k_norm"):
            return node.args[0]
        return node


def _code(function):
    return ast.dump(_SameAsLlama().visit(ast.parse(textwrap.dedent(inspect.getsource(function)))))


def test_the_family_has_the_attention_of_llama():
    # The others differ, and have the tests of tests/python/convert/test_families.py.
    assert set(llama_family.FAMILY) - set(FAMILY) == {"Gemma3", "SmolLM3"}
    assert set(FAMILY) - set(INSTALLED) <= {"EuroBert", "HyperCLOVAX"}
    llama = importlib.import_module(llama_family.FAMILY["Llama"])
    for prefix in INSTALLED:
        module = importlib.import_module(llama_family.FAMILY[prefix])
        kind = getattr(module, f"{prefix}Attention")
        assert _code(kind.forward) == _code(llama.LlamaAttention.forward), prefix
        for name in ("rotate_half", "apply_rotary_pos_emb", "eager_attention_forward"):
            assert _code(getattr(module, name)) == _code(getattr(llama, name)), (prefix, name)


@pytest.mark.parametrize("prefix", [*INSTALLED, "GPT2"])
def test_every_model_equals_the_original(prefix):
    original = build(prefix)
    converted = hw.convert(copy.deepcopy(original))
    assert len(hw.attention_layers(converted)) == 2
    inputs = prompts()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = original(**inputs).logits, converted(**inputs).logits
        close(actual[valid], expected[valid])
        close(
            converted(inputs["input_ids"]).logits, original(inputs["input_ids"]).logits
        )  # no mask
        # Every head is under control, with and without a cache.
        hw.convert(converted, hw.FixedGate())
        for layer in layers_of(converted):
            for head in range(HEADS):
                layer.gate.scale[head] = 0.0
                assert (converted(**inputs).logits - actual)[valid].abs().max() > 1e-4
                layer.gate.scale[head] = 1.0
        close(converted(**inputs).logits[valid], expected[valid])


CACHES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("prefix", ["Llama", "Mistral", "Qwen3", "GPT2"])
def test_generation_gives_the_same_tokens(prefix, options):
    original = build(prefix)
    tokens = []
    for gate in (None, hw.FixedGate()):
        model = hw.convert(copy.deepcopy(original), gate)
        for each in (original, model):
            torch.manual_seed(5)
            tokens.append(generate(each, 7, **options))
    assert all(torch.equal(tokens[0], own) for own in tokens[1:])


def _without_heads(original, scale):
    """The original with the columns of its output projections multiplied: what a plan does."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in model.model.layers:
            own = layer.self_attn
            own.o_proj.weight.mul_(scale.repeat_interleave(own.head_dim))
    return model


@pytest.mark.parametrize("heads", [[0, 3], [1], [2, 3], []], ids=str)
@pytest.mark.parametrize("prefix", ["Llama", "Qwen3"])
def test_a_fixed_gate_equals_zeroed_columns(prefix, heads):
    original = build(prefix)
    model = hw.convert(copy.deepcopy(original), hw.FixedGate(heads))
    expected = _without_heads(original, torch.tensor([float(h in heads) for h in range(HEADS)]))
    inputs = prompts()
    valid = inputs["attention_mask"].bool()
    close(model(**inputs).logits[valid], expected(**inputs).logits[valid])
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, **options), generate(expected, **options))


def test_attention_maps_and_hidden_states():
    original = build("Llama", attn_implementation="eager")
    model = hw.convert(copy.deepcopy(original), hw.FixedGate())
    inputs = prompts()
    valid = inputs["attention_mask"].bool()
    expected = original(**inputs, output_attentions=True, output_hidden_states=True)
    actual = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == 2 and len(actual.hidden_states) == 3
    for a, e in zip(actual.attentions, expected.attentions, strict=True):
        close(a.transpose(1, 2)[valid], e.transpose(1, 2)[valid])
    for layer in layers_of(model):
        layer.gate.scale[1] = 0.0
    dropped = model(**inputs, output_attentions=True).attentions
    assert all((a[:, 1] == 0).all() and (a[:, 0] > 0).any() for a in dropped)


def test_gradients_with_and_without_checkpointing():
    original = build()
    model = hw.convert(copy.deepcopy(original), hw.FixedGate())
    inputs = prompts()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(own):
        own.zero_grad()
        own.train()(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for n, p in own.named_parameters()]

    expected = gradients(original)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for actual, wanted in zip(gradients(model), expected, strict=True):
            close(actual, wanted, 1e-4)


def test_masks_of_four_dimensions():
    original = build()
    model = hw.convert(copy.deepcopy(original), hw.FixedGate())
    ids = prompts()["input_ids"]
    torch.manual_seed(2)
    may = (torch.rand(3, 1, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool)
    may = may & torch.ones(6, 6, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    for mask in (may, torch.zeros(may.shape).masked_fill(~may, lowest)):
        close(model(ids, attention_mask=mask).logits, original(ids, attention_mask=mask).logits)
    # The implementation may be changed afterwards; masks then come in its form.
    inputs = prompts()
    valid = inputs["attention_mask"].bool()
    expected = original(**inputs).logits[valid]
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        close(model(**inputs).logits[valid], expected)


def test_copies_files_and_modes(tmp_path):
    model = hw.convert(build("Mistral"), hw.GroupGate(hw.BudgetGate(keep=0.5)))
    hw.convert(model, keep_selection=True)
    expected = generate(model)
    assert torch.equal(generate(copy.deepcopy(model)), expected)
    assert torch.equal(generate(pickle.loads(pickle.dumps(model))), expected)
    hw.save(model, tmp_path / "m")
    loaded = hw.load(tmp_path / "m")
    assert torch.equal(generate(loaded), expected)
    layer = next(iter(layers_of(loaded)))
    assert isinstance(layer.gate, hw.GroupGate) and layer.keep_selection
    with pytest.raises(ValueError, match="is a GroupedQueryAttention in model and a Multihead"):
        document = json.loads((tmp_path / "m" / "headwise.json").read_text())
        bert = hw.convert(nn.MultiheadAttention(8, 2)).describe()
        document["layers"][0] = {"name": document["layers"][0]["name"], "gate": None, **bert}
        (tmp_path / "m" / "headwise.json").write_text(json.dumps(document))
        hw.load(tmp_path / "m")


def test_replaced_projections_are_called():
    """Adapters and hooks on a projection are not bypassed."""
    model = hw.convert(build(), hw.FixedGate([0, 1, 3]))
    inputs = prompts()
    with torch.no_grad():
        expected = model(**inputs).logits
        for layer in layers_of(model):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer, name, nn.Sequential(getattr(layer, name)))
        valid = inputs["attention_mask"].bool()
        close(model(**inputs).logits[valid], expected[valid])
        calls = []
        next(iter(layers_of(model))).q_proj[0].register_forward_hook(lambda *_: calls.append(1))
        model(**inputs)
        assert calls == [1]


def test_refusals():
    model = build()
    model.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(EMBED, EMBED))
    with pytest.raises(ValueError, match=r"its q_proj was replaced by a torch\..*Sequential"):
        hw.convert(model)
    with pytest.raises(ValueError, match="it is cross-attention"):
        hw.convert(build("GPT2", add_cross_attention=True))
    config = transformers.BloomConfig(vocab_size=50, hidden_size=24, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="no conversion is known for .*BloomAttention"):
        hw.convert(transformers.BloomModel(config))


def test_compiles_whole():
    model = hw.convert(build(), hw.FixedGate([0, 2]))
    inputs = prompts()["input_ids"]
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(inputs, use_cache=False).logits, expected)


# --- gates ----------------------------------------------------------------------------------------


class TokenGate(hw.Gate):
    """Chooses by what it sees alone: which of two sets of heads runs, by the sign of a mean."""

    def __init__(self, execution="selected", embed_dim=None, num_heads=None, device=None,
                 dtype=None):  # fmt: skip
        super().__init__({}, execution=execution, embed_dim=embed_dim, num_heads=num_heads)

    def forward(self, x, key_padding_mask=None):
        mean = torch.ops.headwise.masked_mean(x, key_padding_mask)  # [B, D]
        first = (mean[:, :1] > mean[:, 1:2]).to(x.dtype)  # [B, 1]
        even = (torch.arange(self.num_heads) % 2).to(x.dtype)
        weight = first * even + (1 - first) * (1 - even)
        return hw.Selection(*torch.ops.headwise.select_nonzero(weight), weight)


def test_gates_choose_at_every_step():
    model = hw.convert(build(), TokenGate())
    seen = []
    for layer in layers_of(model):
        layer._observers.append(lambda layer, selection, x, mask: seen.append((x.shape, mask)))
    with hw.trace(model) as trace:
        generate(model, 4)
    shapes = [tuple(shape) for shape, _ in seen]
    assert shapes == [(3, 6, EMBED)] * 2 + [(3, 1, EMBED)] * 6
    for _, mask in seen[:2]:
        assert torch.equal(mask, prompts()["attention_mask"] == 0)
    assert not any(mask is not None and mask.any() for _, mask in seen[2:])
    history = trace.history[next(iter(trace.layers))]
    assert len(history) == 4 and len({str(s.index.tolist()) for s in history}) > 1


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}],
                         ids=["dynamic", "static", "beams"])  # fmt: skip
@pytest.mark.parametrize("gate", [TokenGate(), hw.GroupGate(TokenGate())], ids=["head", "group"])
def test_keeping_the_selection_of_the_prompt(gate, options):
    original = build()
    model = hw.convert(copy.deepcopy(original), gate, keep_selection=True)
    with hw.trace(model) as trace:
        tokens = generate(model, **options)
    for history in trace.history.values():
        assert len(history) == 5
        assert all(torch.equal(s.index, history[0].index) for s in history)
    # Each sequence equals a model that has its heads for good.
    beams = options.get("num_beams", 1)
    inputs = prompts()
    for row in range(3):
        fixed = copy.deepcopy(original)
        hw.convert(fixed)
        for name, layer in hw.attention_layers(fixed).items():
            chosen = trace.history[name][0].weight[row * beams]
            layer.set_gate(hw.FixedGate(scale=chosen.tolist()))
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = fixed.generate(
            **own, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
        )
        assert torch.equal(alone[0], tokens[row])


def test_kept_keys_of_groups_that_were_not_chosen_are_neither_computed_nor_stored():
    model = hw.convert(build(), hw.GroupGate(hw.FixedGate([1])), keep_selection=True)
    every = hw.convert(build(), hw.GroupGate(hw.FixedGate([1])))
    inputs = prompts()
    output, expected = model(**inputs, use_cache=True), every(**inputs, use_cache=True)
    close(output.logits, expected.logits)
    for own, all_heads in zip(
        output.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert own.keys.shape == (3, 1, 6, EMBED // HEADS)
        assert all_heads.keys[:, 0].abs().sum() > 0
        close(own.values[:, 0], all_heads.values[:, 1])
    assert torch.equal(generate(model), generate(every))
    # Without a cache they are not read later.
    layer = next(iter(layers_of(every)))
    k = layer.k_proj
    k.weight.data[:6] = float("nan")  # of the group that was not chosen
    x = torch.randn(2, 5, EMBED)
    assert layer(x, tables(5, 6))[0].isfinite().all()


def test_caches_of_sequences_that_keep_different_groups():
    """One keeps both groups of two, one the first, one the last: slots that stay empty."""
    torch.manual_seed(7)
    layer = hw.GroupedQueryAttention(EMBED, 6, 3, keep_selection=True, gate=hw.FixedGate()).eval()
    dense = copy.deepcopy(layer)
    dense.set_gate(None)
    weight = torch.tensor([[1.0, 0.5, 0, 0, 0, 2.0], [0, 0, 0, 1.0, 0, 0], [0, 0, 0, 0, 1.0, 1.0]])
    index, count = torch.ops.headwise.select_nonzero(weight)
    layer.gate.forward = lambda x, mask=None: hw.Selection(index, count, weight)
    x, rope = torch.randn(3, 6, EMBED), tables(6, 4)
    expected = reference(dense, x, rope, weight)
    cache = hw.KeyValueCache()
    first = layer(x[:, :4], tuple(table[:, :4] for table in rope), cache=cache)[0]
    assert cache.k.shape == (3, 2, 4, 4) and cache.slots.tolist() == [[0, 2], [1, -1], [2, -1]]
    rest, weights = layer(
        x[:, 4:], tuple(table[:, 4:] for table in rope), cache=cache, need_weights=True
    )
    close(torch.cat([first, rest], 1), expected)
    assert weights.shape == (3, 6, 2, 6) and (weights[1, :3] == 0).all()


def test_a_group_gate_chooses_whole_groups():
    torch.manual_seed(3)
    model = hw.convert(build(), hw.GroupGate(hw.BudgetGate(keep=0.5))).train()
    inputs = prompts()
    model(**inputs)
    assert hw.penalty(model).requires_grad
    hw.anneal(model, 1.0)
    model.eval()
    with hw.trace(model) as trace:
        model(**inputs)
    for selection in trace.selections.values():
        ran = torch.ops.headwise.selection_mask(selection.index, selection.count, torch.float32)
        pairs = ran.view(3, GROUPS, 2)
        assert torch.equal(pairs[..., 0], pairs[..., 1])
        assert (selection.weight.view(3, GROUPS, 2).diff(dim=2) == 0).all()
    layer = next(iter(layers_of(model)))
    again = hw.GroupGate(**{k: v for k, v in layer.gate.config().items() if k != "type"})
    assert again.config() == layer.gate.config()
    layer.set_gate(hw.GroupGate(hw.FixedGate([1])))
    assert layer.gate.static_weight().tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="GroupGate must be a layer's gate itself"):
        hw.SharedHeadsGate(hw.GroupGate(hw.RandomGate())).bind(EMBED, HEADS)


@pytest.mark.parametrize("execution", ["all", "selected"])
def test_training_with_gates_reaches_everything(execution):
    torch.manual_seed(4)
    model = hw.convert(build(), hw.BudgetGate(keep=0.5, execution=execution)).train()
    inputs = prompts()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with hw.gates_see(model, labels != -100):
        loss = model(**inputs, labels=labels).loss + hw.penalty(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(layer.q_proj.weight.grad.abs().sum() > 0 for layer in layers_of(model))


def test_no_future_token_reaches_the_gate():
    """A change of the answer changes nothing before it if the gates see the prompt alone."""
    model = hw.convert(build(), TokenGate())
    torch.manual_seed(6)
    ids = torch.randint(3, VOCABULARY, (8, 9))
    other = ids.clone()
    other[:, 5:] = torch.randint(3, VOCABULARY, (8, 4))
    prompt = torch.arange(9).expand(8, 9) < 5

    def before(tokens):
        return model(tokens).logits[:, :5]

    assert (before(ids) - before(other)).abs().max() > 1e-3  # it leaks: the gate sees the answer
    for seen in (prompt, 5):
        with hw.gates_see(model, seen):
            close(before(ids), before(other))
    assert (before(ids) - before(other)).abs().max() > 1e-3  # as before the block
    left = torch.ones(8, 9, dtype=torch.long)
    left[:, :2] = 0  # the first tokens that are not padding
    with hw.gates_see(model, 3):
        a, b = (model(t, attention_mask=left).logits[:, 2:5] for t in (ids, other))
    close(a, b)
    with pytest.raises(ValueError, match=r"tokens of gates_see must have shape \[8, 9\]"):
        with hw.gates_see(model, prompt[:, :4]):
            model(ids)
    with pytest.raises(TypeError, match="tokens must be boolean or a number, got torch.int64"):
        with hw.gates_see(model, left):
            pass
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        with hw.gates_see(model, 0):
            pass


# --- scores and pruning ---------------------------------------------------------------------------


def loss_of(model, inputs):
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_scores_plan_and_whole_groups():
    model = hw.convert(build("Granite"))
    scores = hw.score_heads(model, [prompts()], loss_of, ["michel", "entropy", "hies"])
    assert all(len(v) == HEADS for s in scores.values() for v in s.values.values())
    entropy = scores["entropy"].values[next(iter(hw.attention_layers(model)))]
    assert (entropy > 0).all() and (entropy < 1).all()
    groups = hw.nn.head_groups(model)
    assert list(groups.values()) == [[0, 0, 1, 1]] * 2
    plan = hw.plan(scores["michel"], keep=0.5, groups=groups)
    assert plan.heads_kept == 4 and plan.metric == "michel"
    for entry in plan.layers:
        assert entry.heads in ([], [0, 1], [2, 3], [0, 1, 2, 3])
    small = hw.prune(model, plan)
    assert [layer.num_key_value_heads for layer in layers_of(small)] == [
        len(entry.heads) // 2 for entry in plan.layers
    ]
    assert torch.equal(generate(small), generate(hw.mask(model, plan)))
    with pytest.raises(ValueError, match="groups must name a group for each of the 4 heads"):
        hw.plan(scores["michel"], groups={name: [0] for name in groups})


@pytest.mark.parametrize("kept", [[[0, 1, 3], [2]], [[3], []], [[], [1, 2]], [[0, 2], [1, 2, 3]]],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("prefix", ["Qwen3", "GPT2"])
def test_pruned_decoders_generate_what_masked_ones_do(prefix, kept, tmp_path):
    model = hw.convert(build(prefix))
    entries = [
        hw.pruning.LayerPlan(name, HEADS, heads, [1.0 + 0.25 * h for h in heads])
        for (name, _), heads in zip(hw.attention_layers(model).items(), kept, strict=True)
    ]
    plan = hw.HeadPlan(entries)
    small, masked = hw.prune(model, plan), hw.mask(copy.deepcopy(model), plan)
    inputs = prompts()
    valid = inputs["attention_mask"].bool()
    close(small(**inputs).logits[valid], masked(**inputs).logits[valid])
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        expected = generate(masked, **options)
        assert torch.equal(generate(small, **options), expected)
    hw.save(small, tmp_path / "m")
    assert torch.equal(generate(hw.load(tmp_path / "m")), generate(masked))
    # A pruned model takes gates, and can be pruned again.
    gate = hw.GroupGate(hw.RandomGate(keep=0.5))
    gated = hw.convert(copy.deepcopy(small), lambda name, own: gate if own.num_heads else None)
    assert generate(gated).shape == (3, 11)
