"""Small transformers that a task trains from nothing, because no pretrained one comes with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: The size of both: 4 layers of 6 heads.
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


@dataclass(frozen=True)
class OwnModel:
    """How a task makes its model.

    Attributes:
        name: in results.
        argument: of the model, for its input.
        config: (inputs [N, ...], classes) -> the configuration, of transformers.
        build: configuration -> the classifier, with random weights.
        positions: configuration -> positions of an input, the classification token included.
        dense_steps: in which the dense model learns the task.
        dense_learning_rate: in these steps.
        learning_rate: of every method after them.
    """

    name: str
    argument: str
    config: Callable[[Tensor, int], PretrainedConfig]
    build: Callable[[Any], nn.Module]
    positions: Callable[[Any], int]
    dense_steps: int
    dense_learning_rate: float
    learning_rate: float


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
VIT = OwnModel(
    "small ViT", "pixel_values", _vit_config, _build_vit, _vit_positions, 2000, 2e-3, 3e-4
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
AST = OwnModel(
    "small AST", "input_values", _ast_config, _build_ast, _ast_positions, 2500, 2e-3, 3e-4
)
