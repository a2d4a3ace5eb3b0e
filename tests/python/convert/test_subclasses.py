"""Attention of a custom class: known if all that runs is the known code."""

import logging

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, vit_attention
from support.logs import own_messages
from torch import nn

transformers = pytest.importorskip("transformers")

# The places of attention with a custom class.
PLACES = {
    "BertModel": ("encoder.layer.0.attention.self", "encoder.layer.0.attention"),
    "RobertaForSequenceClassification": ("roberta.encoder.layer.1.attention.self",),
    "DistilBertForSequenceClassification": ("distilbert.transformer.layer.0.attention",),
    "AlbertModel": ("encoder.albert_layer_groups.0.albert_layers.0.attention",),
    "ViTForImageClassification": (vit_attention()[0],),
    "LlamaForCausalLM": ("model.layers.0.self_attn",),
    "Qwen3ForCausalLM": ("model.layers.1.self_attn",),
    "GPT2LMHeadModel": ("transformer.h.0.attn",),
    "TransformerEncoder": ("layers.0.self_attn",),
}
CASES = [(name, place) for name, places in PLACES.items() for place in places]


def build(name, place, **body):
    """A model whose attention at ``place`` has a class of ours, with ``body``."""
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    model = row.build()
    part = model.get_submodule(place)
    kind = type(part)
    part.__class__ = type(f"My{kind.__name__}", (kind,), {"__module__": "somebodys", **body})
    return row, model, part


@pytest.mark.parametrize("name, place", CASES)
def test_a_subclass_that_only_adds_a_method_is_converted(name, place):
    row, model, _ = build(name, place, temperature=lambda self: 1.0, __repr__=lambda self: "mine")
    inputs = row.inputs()
    expected = row.run(model, inputs)
    plain = hw.convert(row.build())
    hw.convert(model)
    assert list(hw.attention_layers(model)) == list(hw.attention_layers(plain))
    torch.testing.assert_close(row.run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    hw.convert(model, hw.FixedGate([0]))
    assert not torch.allclose(row.run(model, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("name, place", CASES)
def test_a_subclass_with_its_own_forward_is_left_alone_and_named(name, place, caplog):
    def forward(self, *args, **kwargs):
        return super(type(self), self).forward(*args, **kwargs)

    row, model, part = build(name, place, forward=forward)
    kind = type(part)
    with pytest.raises(ValueError, match="with its own forward") as error:
        hw.convert(model)
    assert kind.__name__.removeprefix("My") in str(error.value)
    assert not hw.attention_layers(model) and type(part) is kind
    if "Albert" in name:  # which has no other
        return
    with caplog.at_level(logging.WARNING, "headwise.convert"):
        hw.convert(model, strict=False)
    assert type(model.get_submodule(place)) is kind
    assert len(hw.attention_layers(model)) == len(hw.attention_layers(hw.convert(row.build()))) - 1
    (message,) = own_messages(caplog)
    assert message.startswith("left 1 ") and "with its own forward" in message


def test_what_a_mixin_overrides_counts():
    class Louder:
        def _call_impl(self, *args, **kwargs):
            output, maps = super()._call_impl(*args, **kwargs)
            return 2 * output, maps

    class Mine(Louder, nn.MultiheadAttention):
        pass

    with pytest.raises(ValueError, match="MultiheadAttention with its own _call_impl may compute"):
        hw.convert(nn.Sequential(Mine(8, 2)))


def test_other_numbers_of_a_subclass_are_noticed():
    def __init__(self, *args, **kwargs):
        super(type(self), self).__init__(*args, **kwargs)

    _, model, part = build("BertModel", "encoder.layer.0.attention.self", __init__=__init__)
    part.scaling *= 2
    with pytest.raises(ValueError, match="would not compute what it did"):
        hw.convert(model)
