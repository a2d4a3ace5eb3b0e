"""The architectures that :func:`headwise.convert` knows, one file per architecture.

An architecture is found by the class of the module that holds the attention. A subclass counts as
that class if all that runs is the known code: it may add methods, but overrides none. An
architecture's file is imported only when a model has such a module: headwise does not need
transformers to convert a ``torch.nn`` model.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.proof import Trial


def _of_transformers(file: str, *names: str, suffix: str = "Attention") -> dict[str, str]:
    """``"folder.Prefix"`` names the class ``PrefixAttention`` of the model in that folder."""
    split = [name.split(".") for name in names]
    module = "transformers.models.{0}.modeling_{0}.{1}{2}"
    return {module.format(*own, suffix): f"headwise.convert.{file}" for own in split}


# Class of the module that holds the attention -> file whose ARCHITECTURE converts it.
_FILES = {
    "torch.nn.modules.activation.MultiheadAttention": "headwise.convert.torch_attention",
    **_of_transformers("albert", "albert.Albert"),
    **_of_transformers(
        "bart",
        "bart.Bart",
        "blenderbot.Blenderbot",
        "blenderbot_small.BlenderbotSmall",
        "m2m_100.M2M100",
        "marian.Marian",
        "mbart.MBart",
        "pegasus.Pegasus",
        "plbart.PLBart",
        "whisper.Whisper",
    ),
    **_of_transformers(
        "bert",
        "bert.Bert",
        "camembert.Camembert",
        "data2vec.Data2VecText",
        "electra.Electra",
        "ernie.Ernie",
        "roberta.Roberta",
        "roc_bert.RoCBert",
        "xlm_roberta.XLMRoberta",
    ),
    "transformers.models.data2vec.modeling_data2vec_text.Data2VecTextAttention": (
        "headwise.convert.bert"
    ),
    **_of_transformers(
        "clip",
        "altclip.AltCLIP",
        "clip.CLIP",
        "clipseg.CLIPSeg",
        "siglip.Siglip",
        "siglip2.Siglip2",
    ),
    **_of_transformers("cohere", "cohere.Cohere", "cohere2.Cohere2"),
    **_of_transformers("detr", "detr.DetrCross", "detr.DetrSelf"),
    **_of_transformers("distilbert", "distilbert.DistilBert", suffix="SelfAttention"),
    **_of_transformers("gemma2", "gemma2.Gemma2"),
    **_of_transformers("gpt2", "gpt2.GPT2"),
    **_of_transformers("gpt_neox", "gpt_neox.GPTNeoX"),
    **_of_transformers("gpt_oss", "gpt_oss.GptOss"),
    **_of_transformers(
        "llama",
        "arcee.Arcee",
        "dots1.Dots1",
        "eurobert.EuroBert",
        "gemma.Gemma",
        "gemma3.Gemma3",
        "granite.Granite",
        "granitemoe.GraniteMoe",
        "granitemoeshared.GraniteMoeShared",
        "hyperclovax.HyperCLOVAX",
        "jais2.Jais2",
        "llama.Llama",
        "mistral.Mistral",
        "mixtral.Mixtral",
        "phimoe.Phimoe",
        "qwen2.Qwen2",
        "qwen2_moe.Qwen2Moe",
        "qwen3.Qwen3",
        "qwen3_moe.Qwen3Moe",
        "smollm3.SmolLM3",
        "solar_open.SolarOpen",
    ),
    **_of_transformers("modernbert", "modernbert.ModernBert"),
    **_of_transformers("mpnet", "mpnet.MPNet", suffix="SelfAttention"),
    **_of_transformers("neighbours", "glm.Glm", "glm4.Glm4"),
    **_of_transformers("olmo2", "olmo2.Olmo2", "olmo3.Olmo3"),
    **_of_transformers("opt", "opt.OPT"),
    **_of_transformers("phi3", "phi3.Phi3"),
    **_of_transformers("qwen3_next", "qwen3_next.Qwen3Next"),
    **_of_transformers("t5", "mt5.MT5", "t5.T5"),
    **_of_transformers(
        "vit",
        "audio_spectrogram_transformer.AST",
        "deit.DeiT",
        "dinov2.Dinov2",
        "dinov2_with_registers.Dinov2WithRegisters",
        "ijepa.IJepa",
        "vit.ViT",
        "vit_mae.ViTMAE",
        "vit_msn.ViTMSN",
    ),
    "transformers.models.data2vec.modeling_data2vec_audio.Data2VecAudioAttention": (
        "headwise.convert.wav2vec2"
    ),
    **_of_transformers(
        "wav2vec2",
        "hubert.Hubert",
        "sew.SEW",
        "unispeech.UniSpeech",
        "unispeech_sat.UniSpeechSat",
        "wav2vec2.Wav2Vec2",
    ),
    **dict.fromkeys(
        (
            "timm.layers.attention.Attention",
            "timm.layers.attention.AttentionRope",
            "timm.models.beit.Attention",
            "timm.models.eva.EvaAttention",
        ),
        "headwise.convert.timm_attention",
    ),
    **_of_transformers("wavlm", "wavlm.WavLM"),
}

_DISENTANGLED = (
    "its scores have separate terms for relative positions (disentangled attention), which no "
    "kernel of headwise computes: use an encoder without them, such as RoBERTa or ModernBERT"
)
_WINDOWS = (
    "it attends within windows, each a row of its batch, so that a gate would choose heads by "
    "window and not by image: use a model that attends to whole images, such as ViT or DINOv2"
)

# Class of attention that is known and not converted -> why.
REFUSED = {
    f"transformers.models.{folder}.modeling_{folder}.{name}": reason
    for folder, name, reason in (
        ("deberta", "DisentangledSelfAttention", _DISENTANGLED),
        ("deberta_v2", "DisentangledSelfAttention", _DISENTANGLED),
        ("swin", "SwinAttention", _WINDOWS),
        ("swin", "SwinSelfAttention", _WINDOWS),  # of older versions
    )
}
_REGISTERED: dict[str, Architecture] = {}


class Architecture(abc.ABC):
    """How one class of attention module becomes a layer whose heads can be chosen."""

    #: Its name in the support matrix.
    name: str

    def of(self, module: nn.Module) -> Architecture:
        """This architecture, or the one for the layout of ``module`` in another version."""
        return self

    def is_converted(self, module: Any) -> bool:
        """Whether ``module``, of this architecture's class, was converted before (useful if
        :meth:`convert` changes a module in place)."""
        return False

    @abc.abstractmethod
    def refusal(self, module: Any) -> str | None:
        """Why this ``module`` cannot be converted (completes 'refused: ...'); None if it can."""

    @abc.abstractmethod
    def convert(self, module: Any) -> tuple[nn.Module, AttentionLayer]:
        """``module``'s replacement, and the ungated layer in it. Parameters are kept, not copied,
        if their layout allows. The replacement may be ``module`` itself, changed in place."""

    def trial(self, module: Any) -> Trial | None:
        """Calls ``module`` or its replacement on made-up tokens: their outputs must agree. None:
        :func:`headwise.convert` cannot try it out, and logs this."""
        return None

    def copied_parameters(self, module: Any) -> list[nn.Parameter]:
        """The parameters of ``module`` that are copied, and so must not be shared."""
        return []

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:  # noqa: B027
        """Called once after all of a model's modules of this class, the old ones in ``converted``,
        were replaced."""


def family(file: str) -> dict[str, str]:
    """The classes ``PREFIXAttention`` that a file converts: prefix -> their module."""
    found = {}
    for path, own in _FILES.items():
        module, _, name = path.rpartition(".")
        if own == file:
            found[name.removesuffix("Attention")] = module
    return found


def class_path(kind: type) -> str:
    """The qualified name of a class, ``package.module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register_architecture(path: str, architecture: Architecture) -> None:
    """Registers attention modules of class ``path`` for :func:`headwise.convert`.

    Args:
        path: qualified name of the module's class, ``package.module.Class``.
        architecture: converts modules of that class, and of subclasses that override nothing of
            it.

    Raises:
        TypeError: ``architecture`` is not an :class:`Architecture`.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            f"architecture must be a headwise.convert.Architecture, got "
            f"{type(architecture).__name__}"
        )
    _REGISTERED[path] = architecture


#: What a subclass may override and still compute the same as its base: ``convert`` looks at the
#: numbers and modules that ``__init__`` made.
_OF_NO_CONSEQUENCE = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__repr__", "extra_repr"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"),
    *("__getstate__", "__setstate__", "__deepcopy__"),
    *("__parameters__", "__orig_bases__"),
}


def overridden(kind: type, base: type) -> str | None:
    """What a subclass overrides of ``base``; None: it only adds."""
    for part in kind.__mro__:
        if part in base.__mro__:
            continue
        for name in vars(part):
            if hasattr(base, name) and name not in _OF_NO_CONSEQUENCE:
                return name
    return None


def known_base(kind: type) -> type | None:
    """The nearest class that can be converted: ``kind`` itself or a base of it."""
    known = {*_REGISTERED, *_FILES}
    return next((base for base in kind.__mro__ if class_path(base) in known), None)


def find_architecture(
    module: nn.Module, adapters: Mapping[type, Architecture] | None = None
) -> Architecture | None:
    """The architecture for the class of ``module``, or for a base class of which it overrides
    nothing; an entry of ``adapters`` for exactly its class comes first."""
    if adapters and type(module) in adapters:
        return adapters[type(module)]
    base = known_base(type(module))
    if base is None or overridden(type(module), base) is not None:
        return None
    path = class_path(base)
    if path in _REGISTERED:
        return _REGISTERED[path].of(module)
    return importlib.import_module(_FILES[path]).ARCHITECTURE.of(module)


def prefix_in(known: Mapping[str, str], kind: type, suffix: str) -> str:
    """The prefix of the name of a class of a :func:`family`; ``kind`` is one or a subclass.

    Raises:
        AttributeError: it is neither.
    """
    for base in kind.__mro__:
        prefix = base.__name__.removesuffix(suffix)
        if base.__name__ == prefix + suffix and known.get(prefix) == base.__module__:
            return prefix
    raise AttributeError(f"{class_path(kind)} is none of its classes")


def supported_classes() -> list[str]:
    """The classes of attention module that can be converted."""
    return sorted({*_FILES, *_REGISTERED})
