"""Replacements of attention of transformers or torch: every argument works or is refused."""

import copy
import inspect

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, EMBED, HEADS, vit_attention
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402

LENGTH, BATCH = 5, 2

# An architecture -> the class of the module that its conversion replaces.
ORIGINALS = {
    "BertModel": "BertAttention",
    "XLMRobertaModel": "XLMRobertaAttention",
    "DistilBertForSequenceClassification": "DistilBertSelfAttention",
    "AlbertModel": "AlbertAttention",
    "ViTForImageClassification": "ViTAttention",
    "LlamaForCausalLM": "LlamaAttention",
    "Qwen3ForCausalLM": "Qwen3Attention",
    "GPT2LMHeadModel": "GPT2Attention",
}
# Before transformers 5.9, ViTAttention is called with hidden states alone.
WITH_A_MASK = [
    name for name in ORIGINALS if name[:3] != "ViT" or vit_attention()[0].startswith("vit.layers")
]
DECODERS = [name for name in ORIGINALS if name.endswith("CausalLM") or name.startswith("GPT2")]


def pair(name):
    """The first attention of a model, and its replacement after a conversion."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    model.set_attn_implementation("sdpa")
    converted = hw.convert(copy.deepcopy(model))
    found = [path for path, part in model.named_modules() if type(part).__name__ == ORIGINALS[name]]
    return model.get_submodule(found[0]), converted.get_submodule(found[0])


def positional(name):
    x = torch.randn(BATCH, LENGTH, EMBED)
    if name not in DECODERS or name.startswith("GPT2"):
        return {"hidden_states": x}
    angle = torch.rand(1, LENGTH, EMBED // HEADS // 2).repeat(1, 1, 2)
    return {"hidden_states": x, "position_embeddings": (angle.cos(), angle.sin())}


VALUES = {
    "attention_mask": lambda: torch.rand(BATCH, 1, LENGTH, LENGTH) + torch.eye(LENGTH) > 0.5,
    "cache": DynamicCache,
    "past_key_values": DynamicCache,
    "encoder_hidden_states": lambda: torch.randn(BATCH, 3, EMBED),
    "encoder_attention_mask": lambda: torch.ones(BATCH, 1, LENGTH, 3, dtype=torch.bool),
    "output_attentions": lambda: False,
    "is_causal": lambda: False,
    "num_items_in_batch": lambda: torch.tensor(7),
    "position_ids": lambda: torch.arange(LENGTH)[None],
    "cache_position": lambda: torch.arange(LENGTH),
    "max_length_q": lambda: LENGTH,
    "max_length_k": lambda: LENGTH,
}


def parameters_of(original):
    return inspect.signature(inspect.unwrap(type(original).forward)).parameters


def named_arguments(original):
    """The names in the signature of the original's forward, and those that transformers declares
    for its ``**kwargs``; the cache under both of the names it has had."""
    names = [
        name
        for name, kind in inspect.signature(
            inspect.unwrap(type(original).forward)
        ).parameters.items()
        if kind.kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY) and name != "self"
    ]
    if {"cache", "past_key_values"} & set(names):
        names += ["cache", "past_key_values"]
    names += [*TransformersKwargs.__annotations__, "cache_position", "use_cache"]
    return sorted(set(names) - {"self", "hidden_states", "position_embeddings"})


@pytest.mark.parametrize("name", WITH_A_MASK)
def test_every_argument_of_the_original_works_or_is_refused_by_name(name):
    original, replacement = pair(name)
    understood = []
    for argument in named_arguments(original):
        inputs = positional(name)
        make = VALUES.get(argument, lambda: torch.ones(BATCH, dtype=torch.int32))
        extra = {argument: make()}
        try:
            actual, _ = replacement(**inputs, **extra)
        except (TypeError, ValueError) as error:
            assert argument in str(error) or "cache must be None" in str(error)
            continue
        understood.append(argument)
        taken = {"cache", "past_key_values"} & set(parameters_of(original))
        if argument in ("cache", "past_key_values"):
            extra = {next(iter(taken)): make()}
        expected, *_ = original(**{"attention_mask": None, **inputs, **extra})
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert {"attention_mask", "position_ids", "num_items_in_batch"} <= set(understood)
    assert ("cache" in understood) == ("past_key_values" in understood) == (name in DECODERS)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("value", [torch.zeros(3), True, 0.5, "x"], ids=lambda v: type(v).__name__)
def test_a_made_up_argument_is_refused(name, value):
    _, replacement = pair(name)
    with pytest.raises(TypeError, match=r"(Selected\w+|ViTAttention)\W.*'head_temperature'"):
        replacement(**positional(name), head_temperature=value)
    if type(replacement).__name__.startswith(
        "Selected"
    ):  # before 5.9 not ViT's, which is the original
        replacement(**positional(name), head_temperature=None)


def test_torchs_replacement_refuses_a_made_up_argument():
    layer = hw.convert(nn.MultiheadAttention(EMBED, HEADS), hw.FixedGate())
    x = torch.randn(LENGTH, BATCH, EMBED)
    with pytest.raises(TypeError, match="head_temperature"):
        layer(x, x, x, head_temperature=None)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("word", ["cache", "past_key_values"])
def test_the_cache_is_used_under_both_of_its_names(name, word):
    original, replacement = pair(name)
    own = "cache" if "cache" in parameters_of(original) else "past_key_values"
    first, second = DynamicCache(), DynamicCache()
    for _ in range(3):
        inputs = positional(name)
        inputs["hidden_states"] = inputs["hidden_states"][:, :1]
        if "position_embeddings" in inputs:
            inputs["position_embeddings"] = tuple(t[:, :1] for t in inputs["position_embeddings"])
        expected, *_ = original(**inputs, attention_mask=None, **{own: first})
        actual, _ = replacement(**inputs, **{word: second})
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert second.get_seq_length() == 3


@pytest.mark.parametrize("name", DECODERS)
def test_two_caches_are_refused(name):
    _, replacement = pair(name)
    with pytest.raises(TypeError, match="takes one cache, as cache or as past_key_values, got two"):
        replacement(**positional(name), cache=DynamicCache(), past_key_values=DynamicCache())


def test_missing_angles_are_refused():
    _, replacement = pair("LlamaForCausalLM")
    with pytest.raises(TypeError, match="SelectedLlamaAttention needs position_embeddings"):
        replacement(torch.randn(BATCH, LENGTH, EMBED))


def test_a_causal_encoder_is_refused():
    _, replacement = pair("BertModel")
    with pytest.raises(ValueError, match="is_causal must be None or False, got True"):
        replacement(torch.randn(BATCH, LENGTH, EMBED), is_causal=True)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("padded", [True, False])
def test_layers_left_alone_in_a_converted_decoder_compute_what_they_did(name, padded):
    """They share the configuration, so they are called by the implementation that it names."""
    row = ARCHITECTURES[name]
    torch.manual_seed(0)
    original = row.build()
    model = copy.deepcopy(original)
    parts = [p for p, m in model.named_modules() if type(m).__name__ == ORIGINALS[name]]
    last = model.get_submodule(parts[-1])
    projection = "o_proj" if hasattr(last, "o_proj") else "c_proj"
    setattr(last, projection, nn.Sequential(getattr(last, projection)))  # cannot be converted
    hw.convert(model, strict=False)
    assert len(hw.attention_layers(model)) == len(parts) - 1 > 0
    inputs = row.inputs()
    if not padded:
        del inputs["attention_mask"]
    valid = inputs.get("attention_mask", torch.ones(3, 7)).bool()
    torch.testing.assert_close(
        model(**inputs).logits[valid], original(**inputs).logits[valid], rtol=1e-5, atol=1e-5
    )
    if padded:
        inputs = {key: value[:1].flip(1) for key, value in inputs.items()}  # padded on the right
    tokens = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (original, model)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_what_only_the_loss_takes_passes_through(name):
    """transformers hands it down to the attention with everything else."""
    original = next(row for row in ARCHITECTURES.values() if row.name == name).build()
    ids = torch.randint(3, 20, (BATCH, LENGTH))
    labels = ids.roll(-1, dims=1)
    options = {"labels": ids, "shift_labels": labels, "ignore_index": int(labels[0, 0])}
    converted = hw.convert(copy.deepcopy(original))
    expected = original(ids, **options).loss
    torch.testing.assert_close(converted(ids, **options).loss, expected, rtol=1e-5, atol=1e-5)
    assert expected != original(ids, labels=ids).loss
