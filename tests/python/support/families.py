"""Families of models beyond those of architectures.py: small random ones, and how to run them.

tests/python/convert/test_families.py holds each to the same tests; docs/convert.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import headwise as hw
import torch
from headwise.explain import AnnotatedBatch
from torch import Tensor, nn

from support.architectures import EMBED, HEADS, padding_mask

VOCABULARY = 50


@dataclass(frozen=True)
class Family:
    """One row: a model, what it is called with, and which rows of its output count.

    Attributes:
        models: what docs/convert.md calls the models.
        attention: what it calls their attention.
        build: -> a model in evaluation mode.
        inputs: -> its arguments.
        layers: how many attention layers it has.
        generates: whether ``generate`` takes the same arguments.
        maps: the outputs that are attention maps.
        mean_maps: the original gives each head the mean of all.
        tokens: arguments -> which tokens of the encoder's sequence are no padding, ``[B, L]``, for
            :func:`headwise.head_roles`; None: it has several sequences.
    """

    models: str
    attention: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    layers: int
    generates: bool = False
    maps: tuple[str, ...] = ("attentions",)
    mean_maps: bool = False
    #: Its padding, which is not compared.
    padding: Callable[[dict[str, Any]], Tensor | None] = field(default=lambda inputs: None)
    tokens: Callable[[dict[str, Any]], Tensor] | None = field(
        default=lambda inputs: inputs["attention_mask"] == 1
    )

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        output = model(**inputs)
        for name in ("logits", "logits_per_image", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                rows = getattr(output, name)
                break
        padding = self.padding(inputs)
        return rows if padding is None else rows[~padding]


def randomised(model: nn.Module) -> nn.Module:
    """So that no head and no bias can be forgotten unnoticed."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.dim() == 2:
                parameter.mul_(3.0)
    return model.eval()


def made(prefix: str, kind: str, **config: Any) -> nn.Module:
    import transformers

    return randomised(
        getattr(transformers, prefix + kind)(getattr(transformers, f"{prefix}Config")(**config))
    )


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    **TOKENS,
    "d_model": EMBED,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "scale_embedding": False,
}


def seq2seq(prefix: str, **config: Any) -> nn.Module:
    kind = "MTModel" if prefix == "Marian" else "ForConditionalGeneration"
    config_of = {"dropout": 0.0, **SEQ2SEQ, **config}
    return made(prefix, kind, **config_of)


def t5(prefix: str, **config: Any) -> nn.Module:
    sizes = {
        **TOKENS,
        "d_model": EMBED,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
        "dropout_rate": 0.0,
    }
    model = made(prefix, "ForConditionalGeneration", **{**sizes, **config})
    with torch.no_grad():  # a position bias of the size of the scores
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_()
    return model


def text_inputs() -> dict[str, Any]:
    mask = (~padding_mask([7, 2, 5])).long()
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 7)) * mask, "attention_mask": mask}


def seq2seq_inputs() -> dict[str, Any]:
    targets = padding_mask([5, 5, 3])
    return {
        **text_inputs(),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (3, 5)),
        "decoder_attention_mask": (~targets).long(),
    }


def whisper_inputs() -> dict[str, Any]:
    targets = padding_mask([5, 5, 3])
    return {
        "input_features": torch.randn(3, 8, 12),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (3, 5)),
        "decoder_attention_mask": (~targets).long(),
    }


def target_padding(inputs: dict[str, Any]) -> Tensor:
    return inputs["decoder_attention_mask"] == 0


def token_padding(inputs: dict[str, Any]) -> Tensor:
    return inputs["attention_mask"] == 0


THREE = ("encoder_attentions", "decoder_attentions", "cross_attentions")


def _seq2seq_row(models: str, build: Callable[[], nn.Module], **options: Any) -> Family:
    return Family(
        models,
        "encoder self, masked self, cross; cache",
        build,
        **{
            "inputs": seq2seq_inputs,
            "layers": 6,
            "generates": True,
            "maps": THREE,
            "padding": target_padding,
            **options,
        },
    )


def text(prefix: str, kind: str, **config: Any) -> nn.Module:
    """An encoder or a decoder whose configuration has the names of Llama's."""
    sizes = {
        **TOKENS,
        "hidden_size": EMBED,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    return made(prefix, kind, **{**sizes, **config})


def gemma3() -> nn.Module:
    import transformers

    config = transformers.Gemma3TextConfig(
        **TOKENS,
        **TOWER,
        max_position_embeddings=32,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return randomised(transformers.Gemma3ForCausalLM(config))


def decoder_inputs() -> dict[str, Any]:
    """Padded on the left, as for generation."""
    return {name: tensor.flip(1) for name, tensor in text_inputs().items()}


TOWER = {
    "hidden_size": EMBED,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
}


def two_towers(prefix: str, **config: Any) -> nn.Module:
    words = {**TOWER, **TOKENS, "max_position_embeddings": 16, "projection_dim": EMBED}
    image = {**TOWER, "image_size": 8, "patch_size": 4, "projection_dim": EMBED}
    return made(prefix, "Model", text_config=words, vision_config=image, **config)


def two_inputs() -> dict[str, Any]:
    inputs = text_inputs()
    inputs["input_ids"][:, 0] = 2  # CLIP reads the text where its end is
    return {**inputs, "pixel_values": torch.randn(3, 3, 8, 8)}


def siglip_inputs() -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, VOCABULARY, (3, 16)),
        "attention_mask": (~padding_mask([16, 9, 12])).long(),
        "pixel_values": torch.randn(3, 3, 8, 8),
    }


def speech(prefix: str) -> nn.Module:
    return text(
        prefix,
        "ForCTC",
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )


def wavlm() -> nn.Module:
    model = speech("WavLM")
    with torch.no_grad():  # a position bias of the size of the scores
        for name, parameter in model.named_parameters():
            if "rel_attn_embed" in name:
                parameter.normal_()
    return model


def detr() -> nn.Module:
    import transformers

    layers = {name: value for name, value in SEQ2SEQ.items() if "er_" in name}
    images = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    return made(
        "Detr",
        "ForObjectDetection",
        **layers,
        d_model=EMBED,
        dropout=0.0,
        num_queries=5,
        num_labels=6,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(**images, out_features=["stage2"]),
    )


#: The second image is narrower than the first.
IMAGES = torch.ones(2, 32, 32, dtype=torch.long)
IMAGES[1, :, 20:] = 0


def speech_inputs() -> dict[str, Any]:
    """Of lengths that come to seven, three and five frames."""
    return {
        "input_values": torch.randn(3, 31),
        "attention_mask": (~padding_mask([31, 15, 23])).long(),
    }


def speech_padding(inputs: dict[str, Any]) -> Tensor:
    return padding_mask([7, 3, 5])


def speech_tokens(inputs: dict[str, Any]) -> Tensor:
    return ~speech_padding(inputs)


def _text_row(
    models: str, attention: str, build: Callable[[], nn.Module], **options: Any
) -> Family:
    return Family(
        models,
        attention,
        build,
        **{"inputs": text_inputs, "layers": 2, "padding": token_padding, **options},
    )


def _decoder_row(models: str, prefix: str, attention: str = "", **config: Any) -> Family:
    return _text_row(
        models,
        "causal self; cache" + (attention and f"; {attention}"),
        lambda: text(prefix, "ForCausalLM", **config),
        inputs=decoder_inputs,
        generates=True,
    )


WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "max_target_positions": 32,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}

QWEN3_NEXT = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

FAMILIES: dict[str, Family] = {
    **{
        prefix: _seq2seq_row(models, lambda prefix=prefix: seq2seq(prefix))
        for prefix, models in {
            "Bart": "BART",
            "Blenderbot": "Blenderbot",
            "BlenderbotSmall": "Blenderbot small",
            "M2M100": "M2M100, NLLB",
            "Marian": "Marian",
            "MBart": "mBART",
            "PLBart": "PLBart",
            "Pegasus": "Pegasus",
        }.items()
    },
    "Whisper": _seq2seq_row(
        "Whisper", lambda: seq2seq("Whisper", **WHISPER), inputs=whisper_inputs,
        tokens=lambda inputs: torch.ones(3, 6, dtype=torch.bool),
    ),
    "T5": _seq2seq_row("T5, Flan-T5", lambda: t5("T5")),
    "MT5": _seq2seq_row(
        "mT5", lambda: t5("MT5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "MPNet": _text_row(
        "MPNet", "self; relative position bias", lambda: text("MPNet", "ForTokenClassification")
    ),
    "ModernBert": _text_row(
        "ModernBERT",
        "self; rotary, alternating windows",
        lambda: text(
            "ModernBert",
            "ForTokenClassification",
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "Wav2Vec2": _text_row(
        "Wav2Vec2", "self", lambda: speech("Wav2Vec2"),
        inputs=speech_inputs, padding=speech_padding, tokens=speech_tokens,
    ),
    "Hubert": _text_row(
        "HuBERT", "self", lambda: speech("Hubert"),
        inputs=speech_inputs, padding=speech_padding, tokens=speech_tokens,
    ),
    "WavLM": _text_row(
        "WavLM",
        "self; gated relative position bias",
        wavlm,
        inputs=speech_inputs,
        padding=speech_padding,
        tokens=speech_tokens,
        mean_maps=True,
    ),
    "Detr": Family(
        "DETR",
        "encoder self, decoder self, cross; positions",
        detr,
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_mask": IMAGES},
        layers=6,
        maps=THREE,
        tokens=None,
    ),
    "CLIP": _text_row(
        "CLIP",
        "self of images; masked self of texts",
        lambda: two_towers("CLIP"),
        inputs=two_inputs,
        layers=4,
        maps=("text_model_output.attentions", "vision_model_output.attentions"),
        padding=lambda inputs: None,
        tokens=None,
    ),
    "Siglip": _text_row(
        "SigLIP",
        "self of images and texts; the pooling head",
        lambda: two_towers("Siglip"),
        inputs=siglip_inputs,
        layers=5,
        maps=("text_model_output.attentions", "vision_model_output.attentions"),
        padding=lambda inputs: None,
        tokens=None,
    ),
    "OPT": _decoder_row("OPT", "OPT", ffn_dim=32, word_embed_proj_dim=EMBED),
    "GPTNeoX": _decoder_row("GPT-NeoX, Pythia", "GPTNeoX", "rotary of a part", rotary_pct=0.5),
    "Phi3": _decoder_row("Phi-3", "Phi3", "grouped, rotary, window", num_key_value_heads=2,
                         sliding_window=4),
    "Gemma2": _decoder_row("Gemma 2", "Gemma2",
                           "grouped, rotary, soft caps, alternating windows",
                           num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5,
                           query_pre_attn_scalar=1,
                           sliding_window=4, attn_implementation="eager"),
    "Gemma3": _text_row(
        "Gemma 3 (text)",
        "causal self; cache; grouped, rotary, norms, alternating windows",
        gemma3,
        inputs=decoder_inputs,
        generates=True,
    ),
    "SmolLM3": _decoder_row("SmolLM3", "SmolLM3", "grouped, rotary in some layers",
                            num_key_value_heads=2, no_rope_layers=[1, 0]),
    "Glm": _decoder_row("GLM", "Glm", "grouped, rotary of neighbours",
                        num_key_value_heads=2, head_dim=8),
    "Glm4": _decoder_row("GLM-4", "Glm4", "grouped, rotary of neighbours",
                         num_key_value_heads=2, head_dim=8),
    "Cohere": _decoder_row("Cohere", "Cohere", "grouped, norms, rotary of neighbours",
                           num_key_value_heads=2, use_qk_norm=True),
    "Cohere2": _decoder_row("Cohere 2", "Cohere2",
                            "grouped, windows, rotary of neighbours in layers with one",
                            num_key_value_heads=2, head_dim=8, sliding_window=4,
                            layer_types=["sliding_attention", "full_attention"]),
    "Olmo2": _decoder_row("OLMo 2", "Olmo2", "grouped, rotary, norms over all heads",
                          num_key_value_heads=2),
    "Olmo3": _decoder_row("OLMo 3", "Olmo3", "grouped, rotary, norms over all heads, windows",
                          num_key_value_heads=2, sliding_window=4,
                          layer_types=["sliding_attention", "full_attention"]),
    "GptOss": _decoder_row("gpt-oss", "GptOss", "grouped, rotary, sinks, alternating windows",
                           num_key_value_heads=2, head_dim=8, sliding_window=4,
                           num_local_experts=2, num_experts_per_tok=1),
    "Qwen3Next": _text_row(
        "Qwen3-Next",
        "causal self; cache; grouped, rotary, norms, gated; linear attention stays",
        lambda: text("Qwen3Next", "ForCausalLM", **QWEN3_NEXT),
        inputs=decoder_inputs,
        layers=2,
        generates=True,
    ),
}  # fmt: skip


def prompts(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("decoder")}


def generate(model: Any, inputs: dict[str, Any], tokens: int = 6, **options: Any) -> Tensor:
    options = {"do_sample": False, "num_beams": 1, **options}
    return model.generate(
        **prompts(inputs), max_new_tokens=tokens, min_new_tokens=tokens, **options
    )


class FirstHalf(hw.Gate):
    """Half of the heads, which half depends on what the gate sees."""

    def __init__(self, execution="selected", embed_dim=None, num_heads=None, **factory):
        super().__init__({}, execution=execution, embed_dim=embed_dim, num_heads=num_heads)

    def forward(self, x, key_padding_mask=None):
        mean = torch.ops.headwise.masked_mean(x, key_padding_mask)  # [B, D]
        first = (mean[:, :1] > mean[:, 1:2]).to(x.dtype)  # [B, 1]
        even = (torch.arange(self.num_heads) % 2).to(x.dtype)
        weight = first * even + (1 - first) * (1 - even)
        return hw.Selection(*torch.ops.headwise.select_nonzero(weight), weight)


def annotated(row: Family, inputs: dict[str, Any]) -> AnnotatedBatch:
    """The arguments, for questions about offsets, entropy and the first token."""
    assert row.tokens is not None
    target = None
    if "decoder_input_ids" in inputs:
        target = AnnotatedBatch(inputs=None, valid=~target_padding(inputs))
    return AnnotatedBatch(inputs=inputs, valid=row.tokens(inputs), target=target)


def table() -> str:
    """The table of docs/convert.md; ``PYTHONPATH=tests/python python -m support.families`` prints
    it."""
    rows = [
        "| model of transformers 5 | attention | layers in the test | generates | explained |",
        "|---|---|---|---|---|",
    ]
    for row in FAMILIES.values():
        generates = "yes" if row.generates else ""
        explained = "" if row.tokens is None else "yes"
        cells = (row.models, row.attention, row.layers, generates, explained)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
