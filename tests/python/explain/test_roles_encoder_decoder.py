"""Roles of heads of encoder-decoders: each kind of attention is asked about its own tokens."""

from __future__ import annotations

import headwise as hw
import pytest
import torch
from headwise.explain import AnnotatedBatch
from torch import nn

WIDTH, HEADS = 16, 3


class Layer(nn.Module):
    """Self-attention and, in a decoder, cross-attention, whose heads attend as prescribed."""

    def __init__(self, cross: bool):
        super().__init__()
        self.self_attn = hw.MultiheadAttention(WIDTH * HEADS, HEADS, batch_first=True)
        if cross:
            self.cross_attn = hw.MultiheadAttention(WIDTH * HEADS, HEADS, batch_first=True)


class EncoderDecoder(nn.Module):
    """Heads 0, 1, 2 of self-attention look at offsets -1, +1 (the encoder) or -2, 0 (the decoder)
    and everywhere; of cross-attention at the counterpart, at the source's first token and
    everywhere."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([Layer(cross=False)])
        self.decoder = nn.ModuleList([Layer(cross=True)])

    def forward(self, source, source_valid, target, target_valid, places):
        batch, length = source.shape
        x = torch.zeros(batch, length, WIDTH * HEADS)
        y = torch.zeros(batch, target.size(1), WIDTH * HEADS)
        everywhere = torch.zeros(batch, length, length)
        near = [9.0 * torch.eye(length).roll(o, 1).expand(batch, -1, -1) for o in (-1, 1)]
        self.attend(self.encoder[0].self_attn, x, x, source_valid, [*near, everywhere])
        size = target.size(1)
        near = [9.0 * torch.eye(size).roll(o, 1).expand(batch, -1, -1) for o in (-2, 0)]
        everywhere = torch.zeros(batch, size, size)
        self.attend(self.decoder[0].self_attn, y, y, target_valid, [*near, everywhere])
        first = torch.zeros(batch, size, length)
        first[:, :, 0] = 9.0
        aligned = 9.0 * nn.functional.one_hot(places, length).float()
        everywhere = torch.zeros(batch, size, length)
        biases = [aligned, first, everywhere]
        return self.attend(self.decoder[0].cross_attn, y, x, source_valid, biases)

    def attend(self, mha, query, memory, valid, biases):
        bias = torch.stack(biases, 1).flatten(0, 1)  # [B * H, L, S]
        return mha(
            query, memory, memory, key_padding_mask=~valid, attn_mask=bias, need_weights=False
        )[0]


def forward(model, inputs):
    return model(**inputs)


def batches(source_length: int, target_length: int, annotated: bool = True):
    """Target token i is aligned with source token ``places[i]``; rows end in padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        sizes = (20, source_length), (20, target_length)
        source, target = (torch.randint(4, 9, size, generator=generator) for size in sizes)
        source_valid, target_valid = (torch.ones(size, dtype=torch.bool) for size in sizes)
        source_valid[::2, -1] = False
        target_valid[::2, -3:] = False
        places = torch.randint(0, source_length - 1, sizes[1], generator=generator)
        inputs = {
            "source": source, "source_valid": source_valid, "target": target,
            "target_valid": target_valid, "places": places,
        }  # fmt: skip
        pairs = [
            [(int(places[b, i]), i) for i in range(target_length) if target_valid[b, i]]
            for b in range(20)
        ]
        found.append(
            AnnotatedBatch(
                inputs=inputs,
                valid=source_valid,
                ids=source,
                alignment=pairs if annotated else None,
                target=AnnotatedBatch(inputs=None, valid=target_valid, ids=target)
                if annotated
                else None,
            )
        )
    return found


@pytest.mark.parametrize("lengths", [(9, 6), (7, 7), (6, 9)])
def test_each_kind_of_attention_is_asked_about_its_own_tokens(lengths):
    torch.manual_seed(0)
    document = hw.head_roles(EncoderDecoder(), batches(*lengths), forward_fn=forward)
    layers = document["layers"]
    assert [(layer["name"], layer["attention"], layer["site"]) for layer in layers] == [
        ("encoder.0.self_attn", "encoder", 0),
        ("decoder.0.self_attn", "decoder", 1),
        ("decoder.0.cross_attn", "cross", 2),
    ]
    roles = [
        [
            {f"{role['role']} {role['detail']}".strip() for role in head["roles"]}
            - ({"narrow"} if layer["attention"] == "cross" else {"narrow", "first"})
            for head in layer["heads"]
        ]
        for layer in layers
    ]
    assert roles[0] == [{"offset -1"}, {"offset +1"}, {"broad"}]
    assert roles[1] == [{"offset -2"}, {"offset 0"}, {"broad"}]
    # The head that looks at the source's first token has no role: cross-attention is asked about
    # alignment alone.
    assert roles[2] == [{"alignment target to source"}, set(), {"broad"}]
    (asked,) = [q for q in document["questions"] if q["attention"] == "cross"]
    assert (asked["best"]["site"], asked["best"]["head"]) == (2, 0)
    assert asked["best"]["share"] == 1.0
    half = document["halves"][1]
    assert half * (lengths[1] - 3) <= asked["trials"] <= half * lengths[1]


def test_rows_of_target_padding_do_not_count():
    """They look at everything; the tokens look at one place. Entropy is that of the tokens."""
    model, (batch, *_) = EncoderDecoder(), batches(7, 7)
    spread = batch.inputs["target_valid"]

    def padded_look_everywhere(model, inputs):
        class Padded(EncoderDecoder):
            def attend(self, mha, query, memory, valid, biases):
                biases = [bias * spread[:, :, None] * 9 for bias in biases]
                return EncoderDecoder.attend(self, mha, query, memory, valid, biases)

        model.__class__ = Padded
        return model(**inputs)

    found = hw.head_roles(model, [batch], forward_fn=padded_look_everywhere)["layers"]
    # Decoder: the head that looks at its own token. Cross-attention: the one at the counterpart.
    for layer, head in ((found[1], 1), (found[2], 0)):
        assert layer["heads"][head]["entropy"] < 1e-6 < 0.99 < layer["heads"][2]["entropy"]


@pytest.mark.parametrize("lengths", [(9, 6), (7, 7)])
def test_cross_attention_without_a_target_is_refused(lengths):
    with pytest.raises(ValueError, match="encoder-decoder need target, the annotated tokens|roles"):
        hw.head_roles(EncoderDecoder(), batches(*lengths, annotated=False), forward_fn=forward)


def test_what_a_target_may_be():
    valid = torch.ones(2, 3, dtype=torch.bool)
    target = AnnotatedBatch(inputs=None, valid=valid)
    with pytest.raises(ValueError, match="target must have the 2 sequences of valid, got 1"):
        AnnotatedBatch(
            inputs=None, valid=valid, target=AnnotatedBatch(inputs=None, valid=valid[:1])
        )
    with pytest.raises(ValueError, match="target must have no target or alignment of its own"):
        nested = AnnotatedBatch(inputs=None, valid=valid, target=target)
        AnnotatedBatch(inputs=None, valid=valid, target=nested)
    with pytest.raises(ValueError, match="batches must all have a target or none, got 1 of 2"):
        some = batches(5, 5)[:2]
        some[1] = batches(5, 5, annotated=False)[1]
        hw.head_roles(EncoderDecoder(), some, forward_fn=forward)
    with pytest.raises(ValueError, match="alignment must join tokens that are neither padding"):
        hw.head_roles(
            EncoderDecoder(),
            [
                AnnotatedBatch(
                    inputs=b.inputs, valid=b.valid, target=b.target, alignment=[[(4, 6)]] * 20
                )
                for b in batches(7, 7)
            ],
            forward_fn=forward,
        )
