"""Small transformers that a task trains from nothing, because no pretrained one comes with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: The size of the classifiers: 4 layers of 6 heads.
_SIZE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 192,
    "attn_implementation": "sdpa",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

#: Patches of an image in a row, at most.
_PATCHES = 4


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A model that learns a task from nothing.

    Attributes:
        name: in results.
        dense_steps: in which the dense model learns the task.
        dense_learning_rate: in these steps.
        learning_rate: of every method after them.
    """

    name: str
    dense_steps: int
    dense_learning_rate: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Classifier(OwnModel):
    """Of inputs of one size.

    Attributes:
        argument: of the model, for its input.
        config: (inputs [N, ...], classes) -> the configuration, of transformers.
        build: configuration -> the classifier, with random weights.
        positions: configuration -> positions of an input, the classification token included.
    """

    argument: str
    config: Callable[[Tensor, int], PretrainedConfig]
    build: Callable[[Any], nn.Module]
    positions: Callable[[Any], int]


@dataclass(frozen=True, kw_only=True)
class Translator(OwnModel):
    """Of texts to texts.

    Attributes:
        config: (tokens of the vocabulary, padding, end) -> the configuration, of transformers.
        build: configuration -> the encoder-decoder, with random weights.
        validation_limit, test_limit: messages at most: every run translates them.
    """

    config: Callable[[int, int, int], PretrainedConfig]
    build: Callable[[Any], nn.Module]
    validation_limit: int
    test_limit: int


def patch_size(side: int) -> int | None:
    """The smallest side of patches that cut an image into at most 4 x 4 of them; None: no side."""
    return next((size for size in range(-(-side // _PATCHES), side) if side % size == 0), None)


def _vit_config(images: Tensor, classes: int) -> PretrainedConfig:
    from transformers import ViTConfig

    side = images.size(-1)
    patch = patch_size(side)
    assert patch is not None  # what makes tasks of images checks it
    return ViTConfig(
        image_size=side,
        patch_size=patch,
        num_channels=images.size(1),
        **_SIZE | {"num_labels": classes},
    )


def _build_vit(config: Any) -> nn.Module:
    from transformers import ViTForImageClassification

    return ViTForImageClassification(config)


def _vit_positions(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2 + 1


#: Square images [N, channels, side, side], in at most 4 x 4 patches.
VIT = Classifier(
    name="small ViT",
    argument="pixel_values",
    config=_vit_config,
    build=_build_vit,
    positions=_vit_positions,
    dense_steps=2000,
    dense_learning_rate=2e-3,
    learning_rate=3e-4,
)


def _ast_config(sounds: Tensor, classes: int) -> PretrainedConfig:
    from transformers import ASTConfig

    return ASTConfig(
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=sounds.size(1),
        num_mel_bins=sounds.size(2),
        **_SIZE | {"num_labels": classes},
    )


def _build_ast(config: Any) -> nn.Module:
    from transformers import ASTForAudioClassification

    return ASTForAudioClassification(config)


def _ast_positions(config: Any) -> int:
    return (config.max_length // 8) * (config.num_mel_bins // 8) + 2


#: Spectrograms [N, frames, mel bands], in patches of 8 x 8 (Gong et al., Interspeech 2021).
AST = Classifier(
    name="small AST",
    argument="input_values",
    config=_ast_config,
    build=_build_ast,
    positions=_ast_positions,
    dense_steps=2500,
    dense_learning_rate=2e-3,
    learning_rate=3e-4,
)


def _marian_config(vocabulary: int, pad: int, end: int) -> PretrainedConfig:
    from transformers import MarianConfig

    sizes: dict[str, Any] = {
        f"{part}_{what}": size
        for part in ("encoder", "decoder")
        for what, size in (("layers", 3), ("attention_heads", 8), ("ffn_dim", 256))
    }
    return MarianConfig(
        vocab_size=vocabulary,
        d_model=128,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=128,
        pad_token_id=pad,
        eos_token_id=end,
        forced_eos_token_id=None,
        decoder_start_token_id=pad,
        use_cache=False,
        **sizes | {"attn_implementation": "sdpa"},
    )


def _build_marian(config: Any) -> nn.Module:
    from transformers import MarianMTModel

    return MarianMTModel(config)


#: The architecture of Marian (Junczys-Dowmunt et al., ACL 2018), with 3 layers of 8 heads on
#: each side: 24 heads of the encoder, 24 of the decoder's self-attention and 24 of its
#: cross-attention.
MARIAN = Translator(
    name="small Marian",
    config=_marian_config,
    build=_build_marian,
    dense_steps=3000,
    dense_learning_rate=1.5e-3,
    learning_rate=3e-4,
    validation_limit=300,
    test_limit=600,
)
