"""The architectures that headwise converts: small random models, and how to run them.

The tests of conversion, pruning and serialization go through this table; docs/convert.md lists it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EMBED, HEADS = 24, 4


@dataclass(frozen=True)
class Architecture:
    """``build()`` -> model in evaluation mode; ``run(model, inputs())`` -> valid output rows."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    run: Callable[[nn.Module, dict], Tensor]

    @property
    def generates(self) -> bool:
        return self.name.endswith(("ForCausalLM", "LMHeadModel"))


def padding_mask(lengths: list[int]) -> Tensor:
    """bool [B, L], True = padding."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


class Wrapped(nn.Module):
    """Plain attention inside a custom module, twice."""

    def __init__(self, **kwargs):
        super().__init__()
        self.first = nn.MultiheadAttention(EMBED, HEADS, **kwargs)
        self.second = nn.MultiheadAttention(EMBED, HEADS, **kwargs)

    def forward(self, x, key_padding_mask=None, attn_mask=None):
        y, _ = self.first(x, x, x, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        y = torch.tanh(x + y)
        return self.second(y, y, y, key_padding_mask=key_padding_mask, attn_mask=attn_mask)[0]


class Cross(nn.Module):
    """Queries of one sequence, keys and values of others, of other widths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            EMBED, HEADS, kdim=10, vdim=14, add_bias_kv=True, add_zero_attn=True, batch_first=True
        )

    def forward(self, query, key, value, key_padding_mask=None):
        return self.attention(query, key, value, key_padding_mask=key_padding_mask)[0]


def _randomise(model: nn.Module) -> nn.Module:
    # Biases start at zero; with zeros a forgotten bias would not be noticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.dim() == 3:
                parameter.normal_()
            else:
                parameter.mul_(2.0)
    return model.eval()


def _valid(output: Tensor, padding: Tensor) -> Tensor:
    return output[~padding]


def _mha_inputs():
    return {"x": torch.randn(3, 7, EMBED), "key_padding_mask": padding_mask([7, 2, 5])}


def _sequence_first_inputs():
    return {"x": torch.randn(6, 3, EMBED), "attn_mask": torch.ones(6, 6).triu(1).bool()}


def _cross_inputs():
    return {
        "query": torch.randn(2, 5, EMBED),
        "key": torch.randn(2, 7, 10),
        "value": torch.randn(2, 7, 14),
        "key_padding_mask": padding_mask([7, 4]),
    }


def _encoder(layers=2, **kwargs):
    kwargs = {"dim_feedforward": 32, "batch_first": True, **kwargs}
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **kwargs)
    nested = not kwargs.get("norm_first", False)
    return _randomise(nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested))


def _encoder_inputs():
    # Left-aligned padding: in evaluation without gradients torch makes a nested tensor of it.
    return {"src": torch.randn(3, 7, EMBED), "src_key_padding_mask": padding_mask([7, 3, 5])}


def _decoder():
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 32, batch_first=True)
    return _randomise(nn.TransformerDecoder(layer, 2))


def _decoder_inputs():
    return {
        "tgt": torch.randn(2, 5, EMBED),
        "memory": torch.randn(2, 7, EMBED),
        "tgt_mask": torch.ones(5, 5).triu(1).bool(),
        "memory_key_padding_mask": padding_mask([7, 4]),
    }


def _transformer_inputs():
    return {
        "src": torch.randn(2, 7, EMBED),
        "tgt": torch.randn(2, 5, EMBED),
        "tgt_mask": torch.ones(5, 5).triu(1).bool(),
        "src_key_padding_mask": padding_mask([7, 4]),
        "memory_key_padding_mask": padding_mask([7, 4]),
    }


def bert_config(**kwargs):
    from transformers import BertConfig

    return BertConfig(
        **{
            "vocab_size": 50,
            "hidden_size": EMBED,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 32,
            "max_position_embeddings": 16,
            **kwargs,
        }
    )


def bert(class_name: str, **kwargs) -> nn.Module:
    import transformers

    return _randomise(getattr(transformers, class_name)(bert_config(**kwargs)))


def albert(class_name: str, **kwargs) -> nn.Module:
    import transformers

    config = transformers.AlbertConfig(
        **{
            "vocab_size": 50,
            "embedding_size": 12,
            "hidden_size": EMBED,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "intermediate_size": 32,
            "max_position_embeddings": 16,
            **kwargs,
        }
    )
    return _randomise(getattr(transformers, class_name)(config))


def small(prefix: str, class_name: str, **kwargs) -> nn.Module:
    """A model of transformers whose configuration has the names of BERT's."""
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        **{
            "vocab_size": 50,
            "hidden_size": EMBED,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 32,
            "max_position_embeddings": 16,
            **kwargs,
        }
    )
    return _randomise(getattr(transformers, class_name)(config))


def distilbert(class_name: str, **kwargs) -> nn.Module:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=50,
        dim=EMBED,
        n_layers=2,
        n_heads=HEADS,
        hidden_dim=32,
        max_position_embeddings=16,
        **kwargs,
    )
    return _randomise(getattr(transformers, class_name)(config))


def vision(prefix: str, class_name: str, **kwargs) -> nn.Module:
    return small(
        prefix, class_name, vocab_size=None, image_size=8, patch_size=4, num_channels=3, **kwargs
    )


def vit_attention() -> tuple[str, tuple[str, str, str]]:
    """Where the first attention of ViTForImageClassification is, and its query, value and output:
    transformers before 5.9 has them in two modules."""
    from transformers.models.vit import modeling_vit

    if hasattr(modeling_vit, "ViTSelfAttention"):
        inner = ("attention.query", "attention.value", "output.dense")
        return "vit.encoder.layer.0.attention", inner
    return "vit.layers.0.attention", ("q_proj", "v_proj", "o_proj")


def decoder(prefix: str, class_name: str, **kwargs) -> nn.Module:
    """A decoder of transformers: two query heads per group, if its heads share."""
    return small(prefix, class_name, num_key_value_heads=2, pad_token_id=0, **kwargs)


def decoder_config(prefix: str = "Llama", **kwargs):
    """A configuration of transformers: eight query heads, which share keys and values in pairs."""
    import transformers

    name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return getattr(transformers, name)(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **kwargs,
        }
    )


def decoder_inputs():
    """Padded on the left, as for generation."""
    return {"input_ids": torch.randint(3, 50, (3, 7)), "attention_mask": bert_mask().flip(1)}


def bert_mask():
    return (~padding_mask([7, 2, 5])).long()


def image_inputs():
    return {"pixel_values": torch.randn(3, 3, 8, 8)}


def bert_inputs():
    return {
        "input_ids": torch.randint(0, 50, (3, 7)),
        "attention_mask": (~padding_mask([7, 2, 5])).long(),
    }


def _run_padded(model, inputs):
    return _valid(model(**inputs), inputs.get("key_padding_mask"))


def _run_encoder(model, inputs):
    return _valid(model(**inputs), inputs["src_key_padding_mask"])


def _run_whole(model, inputs):
    return model(**inputs)


def _run_hidden(model, inputs):
    return _valid(model(**inputs).last_hidden_state, inputs["attention_mask"] == 0)


def _run_image(model, inputs):
    return model(**inputs).last_hidden_state


def _run_token_logits(model, inputs):
    return _valid(model(**inputs).logits, inputs["attention_mask"] == 0)


def _run_logits(model, inputs):
    return model(**inputs).logits


def _bert_row(class_name, run, **kwargs):
    return Architecture(class_name, lambda: bert(class_name, **kwargs), bert_inputs, run)


ARCHITECTURES = {
    row.name: row
    for row in [
        Architecture(
            "MultiheadAttention",
            lambda: _randomise(Wrapped(batch_first=True)),
            _mha_inputs,
            _run_padded,
        ),
        Architecture(
            "MultiheadAttention, sequence first, no bias",
            lambda: _randomise(Wrapped(bias=False)),
            _sequence_first_inputs,
            _run_whole,
        ),
        Architecture(
            "MultiheadAttention, cross, kdim, vdim, add_bias_kv, add_zero_attn",
            lambda: _randomise(Cross()),
            _cross_inputs,
            _run_whole,
        ),
        Architecture("TransformerEncoder", _encoder, _encoder_inputs, _run_encoder),
        Architecture(
            "TransformerEncoder, norm first, gelu",
            lambda: _encoder(norm_first=True, activation="gelu"),
            _encoder_inputs,
            _run_encoder,
        ),
        Architecture("TransformerDecoder", _decoder, _decoder_inputs, _run_whole),
        Architecture(
            "Transformer",
            lambda: _randomise(nn.Transformer(EMBED, HEADS, 1, 1, 32, batch_first=True)),
            _transformer_inputs,
            _run_whole,
        ),
        _bert_row("BertModel", _run_hidden),
        _bert_row("BertForSequenceClassification", _run_logits, num_labels=3),
        _bert_row("BertForTokenClassification", _run_token_logits),
        _bert_row("BertForMaskedLM", _run_token_logits),
        Architecture("AlbertModel", lambda: albert("AlbertModel"), bert_inputs, _run_hidden),
        Architecture(
            "AlbertForSequenceClassification, three groups",
            lambda: albert("AlbertForSequenceClassification", num_hidden_groups=3, num_labels=3),
            bert_inputs,
            _run_logits,
        ),
        *(
            Architecture(
                f"{prefix}Model",
                lambda prefix=prefix: small(prefix, f"{prefix}Model"),
                bert_inputs,
                _run_hidden,
            )
            for prefix in ("Camembert", "Data2VecText", "Ernie", "RoCBert", "XLMRoberta")
        ),
        Architecture(
            "RobertaForSequenceClassification",
            lambda: small("Roberta", "RobertaForSequenceClassification", num_labels=3),
            bert_inputs,
            _run_logits,
        ),
        Architecture(
            "ElectraForSequenceClassification",
            lambda: small(
                "Electra", "ElectraForSequenceClassification", embedding_size=12, num_labels=3
            ),
            bert_inputs,
            _run_logits,
        ),
        Architecture(
            "DistilBertForSequenceClassification",
            lambda: distilbert("DistilBertForSequenceClassification", num_labels=3),
            bert_inputs,
            _run_logits,
        ),
        Architecture(
            "ViTForImageClassification",
            lambda: vision("ViT", "ViTForImageClassification", num_labels=3),
            image_inputs,
            _run_logits,
        ),
        Architecture(
            "Dinov2Model, without biases",
            lambda: vision("Dinov2", "Dinov2Model", qkv_bias=False, use_swiglu_ffn=False),
            image_inputs,
            _run_image,
        ),
        *(
            Architecture(
                f"{prefix}Model",
                lambda prefix=prefix: vision(prefix, f"{prefix}Model"),
                image_inputs,
                _run_image,
            )
            for prefix in ("DeiT", "Dinov2WithRegisters", "IJepa", "ViTMSN")
        ),
        Architecture(
            "LlamaForCausalLM",
            lambda: decoder("Llama", "LlamaForCausalLM"),
            decoder_inputs,
            _run_token_logits,
        ),
        Architecture(
            "MistralModel, sliding window",
            lambda: decoder("Mistral", "MistralModel", sliding_window=4, head_dim=EMBED // HEADS),
            decoder_inputs,
            _run_hidden,
        ),
        Architecture(
            "Qwen2ForSequenceClassification",
            lambda: decoder("Qwen2", "Qwen2ForSequenceClassification", num_labels=3),
            decoder_inputs,
            _run_logits,
        ),
        Architecture(
            "Qwen3ForCausalLM",
            lambda: decoder("Qwen3", "Qwen3ForCausalLM", head_dim=EMBED // HEADS),
            decoder_inputs,
            _run_token_logits,
        ),
        Architecture(
            "GPT2LMHeadModel",
            lambda: small("GPT2", "GPT2LMHeadModel", intermediate_size=None, n_inner=32),
            decoder_inputs,
            _run_token_logits,
        ),
    ]
}
