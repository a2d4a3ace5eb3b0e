"""Attention whose scores, inputs or outputs are more than those of plain attention."""

import copy

import headwise as hw
import pytest
import torch
from headwise.convert.gemma2 import SelectedCappedAttention
from support.families import FAMILIES, FirstHalf, generate
from support.structures import make_plan

transformers = pytest.importorskip("transformers")

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NAMES = ["Gemma2", "Cohere", "Olmo2", "GptOss", "Qwen3Next", "WavLM", "Detr"]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def prepared(name, gate=None, **options):
    if name in ("Detr", "Qwen3Next") and VERSION < (5, 6):
        pytest.skip("in older versions it has attention of another layout, or another cache")
    torch.manual_seed(4)
    row = FAMILIES[name]
    return row, hw.convert(row.build(), gate, **options), row.inputs()


def gradients(model, output):
    found = torch.autograd.grad(
        output.square().mean(),
        [p for p in model.parameters() if p.requires_grad],
        allow_unused=True,
    )
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("name", NAMES)
def test_heads_chosen_by_the_input_equal_all_heads_weighted(name):
    row, model, inputs = prepared(name, FirstHalf())
    chosen = row.run(model, inputs)
    with hw.nn.instrument(model) as opened:
        opened.probe(lambda *seen: None)  # every head runs
        every = row.run(model, inputs)
        wanted = gradients(model, every)
    close(chosen, every)
    for own, other in zip(gradients(model, chosen), wanted, strict=True):
        close(own, other, 1e-4)


@pytest.mark.parametrize("name", NAMES[:5])
def test_a_kept_choice_generates_the_same_tokens(name):
    _, model, inputs = prepared(name, FirstHalf(), keep_selection=True)
    tokens = generate(model, inputs)
    with hw.nn.instrument(model) as opened:
        opened.probe(lambda *seen: None)
        assert torch.equal(generate(model, inputs), tokens)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_what_recorders_see_gives_the_maps(name):
    row, model, inputs = prepared(name)
    found = {}

    def probe(name, layer, seen):
        maps = torch.ops.headwise.attention_probabilities(
            seen.q,
            seen.k,
            seen.key_padding_mask,
            seen.attn_mask,
            seen.is_causal,
            added_keys=layer._added_keys,
        )
        found[name] = maps[..., : maps.size(3) - layer._added_keys]

    with torch.no_grad(), hw.nn.instrument(model) as opened:
        opened.probe(probe)
        maps = model(**inputs, output_attentions=True).attentions
    for own, expected in zip(found.values(), maps, strict=True):
        valid = inputs["attention_mask"].bool()
        close(own.transpose(1, 2)[valid], expected.transpose(1, 2)[valid])


def test_caps_are_computed_for_the_chosen_heads_alone(monkeypatch):
    row, model, inputs = prepared("Gemma2", hw.FixedGate([0, 3]))
    change, seen = SelectedCappedAttention._change, []

    def counted(self, q, k, cap):
        seen.append(q.shape[:-2])
        return change(self, q, k, cap)

    monkeypatch.setattr(SelectedCappedAttention, "_change", counted)
    row.run(model, inputs)
    assert seen == [(2 * 3,)] * 2  # two heads of three sequences, in two layers


@pytest.mark.parametrize("name", NAMES)
def test_pruned_twice_equals_masked(name):
    row, model, inputs = prepared(name)
    twice = hw.prune(model, make_plan(model, [[0, 2, 3], [1, 2, 3]], scaled=False))
    twice = hw.prune(twice, make_plan(twice, [[1, 2], [0, 2]], scaled=False))
    masked = hw.mask(copy.deepcopy(model), make_plan(model, [[2, 3], [1, 3]], scaled=False))
    with torch.no_grad():
        close(row.run(twice, inputs), row.run(masked, inputs), 1e-4)


def test_a_pruned_olmo_needs_hw_save(tmp_path):
    _, model, _ = prepared("Olmo2")
    small = hw.prune(model, make_plan(model, [[0, 2], [0, 2]]))
    with pytest.raises(ValueError, match="save_pretrained cannot write this model"):
        small.save_pretrained(tmp_path)


def test_gradients_of_gated_projections():
    row, model, inputs = prepared("Qwen3Next")
    torch.manual_seed(4)
    original = row.build()  # the same again
    for own in (original, model):
        row.run(own, inputs).square().mean().backward()
    for layer, other in (
        (model.model.layers[i].self_attn, original.model.layers[i].self_attn) for i in (0, 2)
    ):
        parts = other.q_proj.weight.grad.unflatten(0, (layer.num_heads, 2, -1))
        close(layer.q_proj.weight.grad, parts[:, 0].flatten(0, 1), 1e-4)
        close(layer.gate_proj.weight.grad, parts[:, 1].flatten(0, 1), 1e-4)
