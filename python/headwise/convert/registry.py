"""The architectures that :func:`headwise.convert` knows, one file each.

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

_BERT, _LLAMA, _VIT = (f"headwise.convert.{name}" for name in ("bert", "llama", "vit"))
_MODELS = "transformers.models."

# Class of the module that holds the attention -> file whose ARCHITECTURE converts it.
_FILES = {
    "torch.nn.modules.activation.MultiheadAttention": "headwise.convert.torch_attention",
    f"{_MODELS}albert.modeling_albert.AlbertAttention": "headwise.convert.albert",
    f"{_MODELS}audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTAttention": (
        _VIT
    ),
    f"{_MODELS}bert.modeling_bert.BertAttention": _BERT,
    f"{_MODELS}camembert.modeling_camembert.CamembertAttention": _BERT,
    f"{_MODELS}data2vec.modeling_data2vec_text.Data2VecTextAttention": _BERT,
    f"{_MODELS}deit.modeling_deit.DeiTAttention": _VIT,
    f"{_MODELS}dinov2.modeling_dinov2.Dinov2Attention": _VIT,
    f"{_MODELS}dinov2_with_registers.modeling_dinov2_with_registers."
    "Dinov2WithRegistersAttention": _VIT,
    f"{_MODELS}distilbert.modeling_distilbert.DistilBertSelfAttention": (
        "headwise.convert.distilbert"
    ),
    f"{_MODELS}electra.modeling_electra.ElectraAttention": _BERT,
    f"{_MODELS}ernie.modeling_ernie.ErnieAttention": _BERT,
    f"{_MODELS}ijepa.modeling_ijepa.IJepaAttention": _VIT,
    f"{_MODELS}roberta.modeling_roberta.RobertaAttention": _BERT,
    f"{_MODELS}roc_bert.modeling_roc_bert.RoCBertAttention": _BERT,
    f"{_MODELS}vit.modeling_vit.ViTAttention": _VIT,
    f"{_MODELS}vit_mae.modeling_vit_mae.ViTMAEAttention": _VIT,
    f"{_MODELS}vit_msn.modeling_vit_msn.ViTMSNAttention": _VIT,
    f"{_MODELS}xlm_roberta.modeling_xlm_roberta.XLMRobertaAttention": _BERT,
    f"{_MODELS}arcee.modeling_arcee.ArceeAttention": _LLAMA,
    f"{_MODELS}dots1.modeling_dots1.Dots1Attention": _LLAMA,
    f"{_MODELS}eurobert.modeling_eurobert.EuroBertAttention": _LLAMA,
    f"{_MODELS}gemma.modeling_gemma.GemmaAttention": _LLAMA,
    f"{_MODELS}granite.modeling_granite.GraniteAttention": _LLAMA,
    f"{_MODELS}granitemoe.modeling_granitemoe.GraniteMoeAttention": _LLAMA,
    f"{_MODELS}granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedAttention": _LLAMA,
    f"{_MODELS}hyperclovax.modeling_hyperclovax.HyperCLOVAXAttention": _LLAMA,
    f"{_MODELS}jais2.modeling_jais2.Jais2Attention": _LLAMA,
    f"{_MODELS}llama.modeling_llama.LlamaAttention": _LLAMA,
    f"{_MODELS}mistral.modeling_mistral.MistralAttention": _LLAMA,
    f"{_MODELS}mixtral.modeling_mixtral.MixtralAttention": _LLAMA,
    f"{_MODELS}phimoe.modeling_phimoe.PhimoeAttention": _LLAMA,
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2Attention": _LLAMA,
    f"{_MODELS}qwen2_moe.modeling_qwen2_moe.Qwen2MoeAttention": _LLAMA,
    f"{_MODELS}qwen3.modeling_qwen3.Qwen3Attention": _LLAMA,
    f"{_MODELS}qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": _LLAMA,
    f"{_MODELS}solar_open.modeling_solar_open.SolarOpenAttention": _LLAMA,
    f"{_MODELS}gpt2.modeling_gpt2.GPT2Attention": "headwise.convert.gpt2",
}
_REGISTERED: dict[str, Architecture] = {}


class Architecture(abc.ABC):
    """How one class of attention module becomes a layer whose heads can be chosen."""

    #: What the support matrix calls it.
    name: str

    def of(self, module: nn.Module) -> Architecture:
        """This architecture, or the one that converts ``module`` as another version writes it."""
        return self

    def is_converted(self, module: Any) -> bool:
        """Whether ``module``, of the class this architecture stands for, was converted before (of
        use where :meth:`convert` changes a module in place)."""
        return False

    @abc.abstractmethod
    def refusal(self, module: Any) -> str | None:
        """Why this ``module`` cannot be converted (completes 'refused: ...'); None if it can."""

    @abc.abstractmethod
    def convert(self, module: Any) -> tuple[nn.Module, AttentionLayer]:
        """``module``'s successor, and the ungated layer in it. Parameters are kept, not copied,
        where their layout allows. The successor may be ``module`` itself, changed in place."""

    def trial(self, module: Any) -> Trial | None:
        """Calls ``module``, and its successor alike, on made-up tokens: their outputs must agree.
        None: :func:`headwise.convert` cannot try it out, and says so in its log."""
        return None

    def copied_parameters(self, module: Any) -> list[nn.Parameter]:
        """The parameters of ``module`` that are copied, and so must belong to it alone."""
        return []

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:  # noqa: B027
        """Called once after all of a model's modules of this class, the old ones in ``converted``,
        were replaced."""


def family(file: str) -> dict[str, str]:
    """The classes ``PREFIXAttention`` that a file converts: prefix -> the module that has them."""
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
    """Teaches :func:`headwise.convert` the attention modules of class ``path``.

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


#: What a subclass may have of its own and still compute what its base does: ``convert`` looks at
#: the numbers and modules that ``__init__`` made.
_OF_NO_CONSEQUENCE = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__repr__", "extra_repr"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"),
    *("__getstate__", "__setstate__", "__deepcopy__"),
    *("__parameters__", "__orig_bases__"),
}


def overridden(kind: type, base: type) -> str | None:
    """What a subclass has in the place of something that ``base`` has; None: it only adds."""
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


def find_architecture(module: nn.Module) -> Architecture | None:
    """The architecture that stands for the class of ``module``, or for a base class of which it
    overrides nothing."""
    base = known_base(type(module))
    if base is None or overridden(type(module), base) is not None:
        return None
    path = class_path(base)
    if path in _REGISTERED:
        return _REGISTERED[path].of(module)
    return importlib.import_module(_FILES[path]).ARCHITECTURE.of(module)


def prefix_in(known: Mapping[str, str], kind: type, suffix: str) -> str:
    """What the name of a class of a :func:`family` begins with; ``kind`` is one or a subclass.

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
