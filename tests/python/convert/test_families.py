"""Every family of models is converted, masked, pruned, saved, gated, traced and generates."""

import copy
import pickle
import threading
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.convert.registry import supported_classes
from support.architectures import HEADS
from support.families import (
    FAMILIES,
    THREE,
    FirstHalf,
    annotated,
    generate,
    seq2seq,
    t5,
    table,
)
from support.structures import make_plan

transformers = pytest.importorskip("transformers")

GENERATING = [name for name, row in FAMILIES.items() if row.generates]
SEQ2SEQ = [name for name, row in FAMILIES.items() if row.maps == THREE]

#: Before 5.9 some of transformers' own models have faults that tests here come across.
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
OLDER = VERSION < (5, 9)


@pytest.fixture(params=FAMILIES, ids=str)
def row(request):
    return family(request.param)


def family(name):
    torch.manual_seed(0)
    if name == "ModernBert" and VERSION < (5, 1):
        pytest.skip("before transformers 5.1 ModernBERT has attention of another layout")
    if name in ("Detr", "Qwen3Next") and VERSION < (5, 6):
        pytest.skip("in older versions it has attention of another layout, or another cache")
    return FAMILIES[name]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(model, output):
    """Of what both models have under one name: embeddings, norms, networks."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.square().mean(), list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


def test_outputs_and_gradients_equal_the_original(row):
    original, inputs = row.build(), row.inputs()
    expected = row.run(original, inputs)
    wanted = gradients(original, expected)
    for gate in (None, hw.FixedGate()):
        model = hw.convert(copy.deepcopy(original), gate)
        assert len(hw.attention_layers(model)) == row.layers
        output = row.run(model, inputs)
        close(output, expected, 1e-4)
        found = gradients(model, output)
        assert len(wanted.keys() & found.keys()) > len(wanted) // 3
        for name in wanted.keys() & found.keys():
            if found[name].shape != wanted[name].shape:  # Qwen3-Next's queries and gates are apart
                assert name.endswith("q_proj.weight")
                continue
            close(found[name], wanted[name], 2e-4 if OLDER else 1e-4)
        with torch.no_grad():
            close(row.run(model, inputs), expected, 1e-4)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_and_pickles(row, copied):
    model, inputs = hw.convert(row.build(), hw.FixedGate(heads=[0, 2])), row.inputs()
    if copied is pickled and any(map(torch.nn.utils.parametrize.is_parametrized, model.modules())):
        model = hw.attention_layers(model)  # torch pickles no model with computed weights
        assert {type(own) for own in pickled(model).values()} == set(map(type, model.values()))
        return
    again = copied(model)
    with torch.no_grad():
        assert torch.equal(row.run(again, inputs), row.run(model, inputs))
    for own, theirs in zip(again.modules(), model.modules(), strict=True):
        assert type(own) is type(theirs)


def test_every_head_is_under_control(row):
    model, inputs = hw.convert(row.build(), hw.FixedGate()), row.inputs()
    with torch.no_grad():
        full = row.run(model, inputs)
        for name, layer in hw.attention_layers(model).items():
            for head in range(HEADS):
                layer.gate.scale[head] = 0.0
                changed = (row.run(model, inputs) - full).abs().max()
                layer.gate.scale[head] = 1.0
                assert changed > 1e-5 * full.abs().max(), f"head {head} of {name}"


@pytest.mark.parametrize("kept", [[[0, 2], [3]], [[], [1, 2, 3]]], ids=str)
def test_pruned_equals_masked_and_is_saved(row, kept, tmp_path):
    model, inputs = hw.convert(row.build()), row.inputs()
    plan = make_plan(model, kept)
    small, masked = hw.prune(model, plan), hw.mask(copy.deepcopy(model), plan)
    with torch.no_grad():
        close(row.run(small, inputs), row.run(masked, inputs), 1e-4)
        hw.save(small, tmp_path / "m")
        loaded = hw.load(tmp_path / "m")
        close(row.run(loaded, inputs), row.run(small, inputs), 0.0)
        if row.generates:
            assert torch.equal(generate(small, inputs), generate(masked, inputs))
            assert torch.equal(generate(loaded, inputs), generate(small, inputs))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_original_class_reads_what_save_pretrained_writes(row, tmp_path):
    original, inputs = row.build(), row.inputs()
    model = hw.convert(copy.deepcopy(original))
    model.save_pretrained(tmp_path)
    again, report = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    if (
        OLDER and "NeoX" in type(original).__name__
    ):  # before 5.6 GPT-NeoX's configuration is read otherwise than it was
        original.save_pretrained(tmp_path / "original")
        original = type(original).from_pretrained(tmp_path / "original").eval()
    with torch.no_grad():
        close(row.run(again.eval(), inputs), row.run(original, inputs))


def test_gates_scores_traces_and_repair(row, tmp_path):
    model, inputs = hw.convert(row.build()), row.inputs()
    scores = hw.score_heads(
        model,
        [inputs],
        lambda own, batch: row.run(own, batch).square().mean(),
        ["michel", "entropy"],
    )
    plan = hw.plan(scores["michel"], keep=0.5)
    small = hw.prune(model, plan, repair=[inputs, row.inputs()], forward_fn=row.run)
    assert all(bool(p.isfinite().all()) for p in small.parameters())
    hw.convert(model, hw.BudgetGate(keep=0.5)).train()
    loss = row.run(model, inputs).square().mean() + hw.penalty(model)
    loss.backward()
    model.eval()
    with hw.trace(model) as trace, torch.no_grad():
        expected = row.run(model, inputs)
    assert set(trace.layers) == set(hw.attention_layers(model))
    hw.save(model, tmp_path / "m")
    with torch.no_grad():
        close(row.run(hw.load(tmp_path / "m"), inputs), expected, 0.0)


def reach(output, path):
    for name in path.split("."):
        output = getattr(output, name)
    return output


def test_attention_maps_are_collected(row):
    original, inputs = row.build(), row.inputs()
    original.set_attn_implementation("eager")
    model = hw.convert(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(**inputs, output_attentions=True)
        actual = model(**inputs, output_attentions=True)
    padding = row.padding(inputs)
    for name in row.maps:
        own, maps = reach(actual, name), reach(expected, name)
        if not maps and OLDER:
            pytest.skip("this version of transformers does not collect the original's maps")
        assert len(own) == len(maps) > 0
        for a, e in zip(own, maps, strict=True):  # [B, H, L, S]
            a, e = a.transpose(1, 2), e.transpose(1, 2)
            if name == "encoder_attentions" and "attention_mask" in inputs:
                valid = inputs["attention_mask"].bool()
            elif padding is not None and padding.shape == a.shape[:2]:
                valid = ~padding
            else:
                valid = torch.ones(a.shape[:2], dtype=torch.bool)
            if row.mean_maps:
                a = a.mean(2, keepdim=True).expand_as(e)
            if "text_model_output" in name and "attention_mask" in inputs:
                valid = inputs["attention_mask"].bool()
            close(a[valid], e[valid], 1e-4)


EXPLAINED = [name for name, one in FAMILIES.items() if one.tokens is not None]


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_heads_look_at(name):
    """The entropy of each head is that of the original's attention, by kind of attention."""
    row = family(name)
    original, inputs = row.build(), row.inputs()
    batch = annotated(row, inputs)
    kinds = ["encoder"] * 2 + ["decoder", "cross"] * 2 if name in SEQ2SEQ else ["self"] * 2
    model = hw.convert(copy.deepcopy(original))
    found = hw.head_roles(model, [batch], forward_fn=lambda m, x: m(**x), progress=False)
    assert [layer["attention"] for layer in found["layers"]] == kinds
    original.set_attn_implementation("eager")
    with torch.no_grad():  # only the converted model tells the heads of some apart
        output = (model if row.mean_maps else original)(**inputs, output_attentions=True)
    maps = [reach(output, key) for key in row.maps]
    if not all(maps) and OLDER:
        pytest.skip("this version of transformers does not collect the original's maps")
    if name in SEQ2SEQ:
        maps = [maps[0], [own for both in zip(maps[1], maps[2], strict=True) for own in both]]
    for layer, weights in zip(found["layers"], (w for own in maps for w in own), strict=True):
        valid = batch.valid if layer["attention"] in ("self", "encoder") else batch.target.valid
        expected = relative_entropy(weights.double(), valid)  # [H]
        close(torch.tensor([head["entropy"] for head in layer["heads"]]), expected.float(), 1e-3)


def relative_entropy(weights, valid):
    """[B, H, L, S] and the queries that count [B, L] -> the mean over inputs [H]."""
    weights = weights / weights.sum(-1, keepdim=True)  # without the sink of gpt-oss
    seen = (weights > 0).sum(-1)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    share = torch.where(seen > 1, entropy / seen.clamp(min=2).log(), 0.0)  # [B, H, L]
    counts = valid[:, None] & torch.ones_like(seen, dtype=torch.bool)
    return ((share * counts).sum(-1) / counts.sum(-1)).mean(0)


CACHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", GENERATING)
def test_generation_gives_the_same_tokens(name):
    if name == "Qwen3Next" and VERSION < (5, 6):
        pytest.skip("in older versions it has a cache of its own")
    torch.manual_seed(1)
    row = FAMILIES[name]
    original, inputs = row.build(), row.inputs()
    models = [hw.convert(copy.deepcopy(original), gate) for gate in (None, hw.FixedGate())]
    for options in CACHES.values():
        expected = generate(original, inputs, **options)
        for model in models:
            assert torch.equal(generate(model, inputs, **options), expected), options


# --- encoders and decoders ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bart", "T5", "Whisper"])
def test_padded_targets_count_nowhere(name):
    """Neither masked self-attention's gates nor cross-attention's see rows of padding."""
    torch.manual_seed(2)
    row = FAMILIES[name]
    model, inputs = hw.convert(row.build(), FirstHalf()), row.inputs()
    with hw.nn.instrument(model) as opened, torch.no_grad():
        seen = {}
        opened.observe(lambda name, layer, selection, x, padding: seen.update({name: padding}))
        before = row.run(model, inputs)
        other = inputs["decoder_input_ids"].clone()
        other[row.padding(inputs)] = 3
        after = row.run(model, {**inputs, "decoder_input_ids": other})
    close(after, before, 0.0)
    decoder = [padding for name, padding in seen.items() if "decoder" in name]
    assert len(decoder) == 4
    assert all(torch.equal(padding, row.padding(inputs)) for padding in decoder)


@pytest.mark.parametrize("name", ["Bart", "T5", "Whisper"])
def test_padding_of_another_threads_targets_counts_nowhere(name):
    torch.manual_seed(2)
    row = FAMILIES[name]
    model, inputs = hw.convert(row.build(), FirstHalf()), row.inputs()
    other = {**inputs, "decoder_attention_mask": torch.ones(3, 5, dtype=torch.long)}
    with torch.no_grad():
        expected = row.run(model, inputs)
        masked = next(v for v in hw.attention_layers(model).values() if v.is_causal)
        started = []

        def between(*_):  # a block's masked self-attention and its cross-attention
            if not started:
                started.append(threading.Thread(target=lambda: model(**other)))
                started[0].start()
                started[0].join()

        masked.register_forward_hook(between)
        close(row.run(model, inputs), expected, 0.0)
    assert started


@pytest.mark.parametrize("name", ["Bart", "T5", "Whisper"])
@pytest.mark.parametrize("keep", [False, True], ids=["each step", "by the prompt"])
def test_cross_keys_are_projected_once_a_sequence(name, keep):
    torch.manual_seed(3)
    row = FAMILIES[name]
    model, inputs = hw.convert(row.build(), FirstHalf(), keep_selection=keep), row.inputs()
    cross = [
        layer
        for layer in hw.attention_layers(model).values()
        if layer.is_decoder and not layer.is_causal
    ]
    calls = []
    for layer in cross:
        before = layer._project

        def counted(linear, x, heads, norm, chosen, layer=layer, before=before):
            calls.append((layer, linear is layer.k_proj))
            return before(linear, x, heads, norm, chosen)

        layer._project = counted
    tokens = generate(model, inputs, 5)
    assert [sum(own is layer and key for own, key in calls) for layer in cross] == [1, 1]
    for layer in cross:
        del layer._project
    if not keep:  # choosing at every step, with a cache and without one
        assert torch.equal(generate(model, inputs, 5), tokens)
    beams = generate(model, inputs, 5, num_beams=2)
    assert beams.shape[0] == 3


def test_three_kinds_of_attention_have_names_of_their_own():
    bart = list(hw.attention_layers(hw.convert(seq2seq("Bart"))))
    assert [name for name in bart if ".0." in name] == [
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
    ]
    t5_names = list(hw.attention_layers(hw.convert(t5("T5"))))
    assert [name for name in t5_names if "block.0." in name] == [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]


def test_the_position_bias_trains():
    """Also where the first layer, which makes it for all, has lost all of its heads."""
    model = hw.convert(t5("T5"), hw.FixedGate())
    model = hw.prune(model, make_plan(model, [[], [0, 3]]))
    row = FAMILIES["T5"]
    row.run(model, row.inputs()).square().mean().backward()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert bias.grad.abs().sum(0).count_nonzero() == 2  # of the two heads that the second has


def test_a_compiled_encoder_decoder():
    row = FAMILIES["Bart"]
    model, inputs = hw.convert(row.build(), hw.FixedGate([0, 2])), row.inputs()
    with torch.no_grad():
        expected = row.run(model, {**inputs, "use_cache": False})
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(row.run(compiled, {**inputs, "use_cache": False}), expected)


# --- refusals -------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 50,
    "pad_token_id": 0,
}
REFUSED = {
    "DebertaV2": ({}, "disentangled attention.*: use an encoder without them"),
    "Swin": ({"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2],
              "window_size": 2}, "within windows.*: use a model that attends to whole images"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", REFUSED)
def test_what_cannot_be_converted_says_why(prefix):
    options, why = REFUSED[prefix]
    sizes = options if prefix == "Swin" else {**SMALL, **options}
    model = getattr(transformers, f"{prefix}Model")(
        getattr(transformers, f"{prefix}Config")(**sizes)
    )
    with pytest.raises(ValueError, match=why):
        hw.convert(model)
    assert not hw.attention_layers(model)


def test_the_documentation_lists_every_family():
    text = (Path(__file__).parents[3] / "docs" / "convert.md").read_text(encoding="utf-8")
    assert table() in text, "python -m support.families prints the table that docs/convert.md needs"
    listed = {path.split(".")[2] for path in supported_classes() if path.startswith("transformers")}
    assert {"bart", "t5", "whisper", "clip", "opt"} <= listed
