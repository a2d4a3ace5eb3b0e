"""Preparing texts for a model: checks, truncation, unknown tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from headwise.io.printable import quoted


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raises an error for texts that no tokenizer accepts.

    Raises:
        TypeError: something that is not a list of strings.
        ValueError: an empty text, or one that UTF-8 cannot hold.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be a list of texts, got {quoted(texts)}")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got {type(text).__name__} at {position}")
        if not text.strip():
            raise ValueError(f"{name} must not hold an empty text, got one at {position}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} must be texts that UTF-8 can hold, got half a surrogate pair at character "
                f"{error.start} of text {position}"
            ) from None


def gives_one_label(config: Any) -> bool:
    """Whether a classifier with this configuration (or None) gives each text one class."""
    kind = getattr(config, "problem_type", None)
    known = kind in ("multi_label_classification", "regression")
    return not known and getattr(config, "num_labels", None) != 1


def check_one_label(config: Any) -> None:
    """Raises an error for a classifier that gives a text several labels or a number:
    log-probabilities and the cross entropy of one class do not describe it.

    Args:
        config: a model's configuration, or None.

    Raises:
        ValueError: it is such a classifier.
    """
    if not gives_one_label(config):
        kind, count = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
        raise ValueError(
            "model must give each text one class, but its configuration says "
            f"problem_type={quoted(kind)} with num_labels={count}"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError for what is not a tokenizer of transformers."""
    if not (callable(tokenizer) and hasattr(tokenizer, "num_special_tokens_to_add")):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {quoted(tokenizer)}")


def check_length(tokenizer: Any, max_length: int | None, *, pair: bool = False) -> None:
    """Raises an error for a length at which nothing of a text, or of one of a pair, would be left.

    Raises:
        ValueError: it is too short.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length is not None and max_length <= special + pair:
        raise ValueError(
            f"max_length must leave room for tokens of the text beside {special} special ones, "
            f"got {max_length}"
        )


#: Models (``config.model_type``) whose positions start after the padding token's id.
_AFTER_PADDING = ("camembert", "data2vec-text", "roberta", "xlm-roberta")


def positions(config: Any) -> int | None:
    """The maximum number of tokens of a model with this configuration; None if unknown."""
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and getattr(config, "model_type", None) in _AFTER_PADDING:
        return known - config.pad_token_id - 1
    return known


def longest(config: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """``max_length``, limited by the maximum of the model and its tokenizer."""
    known = [max_length, positions(config)]
    known.append(getattr(tokenizer, "model_max_length", None))  # 1e30 if unknown
    limit = min((value for value in known if value is not None), default=None)
    return None if limit is None or limit > 1e9 else int(limit)


def encode_texts(
    model: nn.Module, texts: Sequence[str], tokenizer: Any, max_length: int | None
) -> dict[str, Tensor]:
    """Texts as a padded batch on the model's device.

    Raises:
        TypeError: ``tokenizer`` is something else.
        ValueError: no tokenizer, a text that is empty or invalid (half a surrogate pair), or no
            room for any of it.
    """
    if tokenizer is None:
        raise ValueError("inputs that are texts need tokenizer=, got None")
    check_tokenizer(tokenizer)
    check_texts("inputs", texts)
    max_length = longest(getattr(model, "config", None), tokenizer, max_length)
    if max_length is not None:
        check_length(tokenizer, max_length)
    batch = tokenizer(
        list(texts),
        padding=True,
        truncation=max_length is not None,
        max_length=max_length,
        return_tensors="pt",
    )
    parameter = next(model.parameters())
    return {name: value.to(parameter.device) for name, value in batch.items()}


def tokens_cut(inputs: Mapping[str, Tensor], texts: Sequence[str], tokenizer: Any) -> list[int]:
    """How many tokens of each text were left out because it is too long."""
    kept = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else None
    whole = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if kept is None:
        return [max(0, count - inputs["input_ids"].size(1)) for count in whole]
    return [count - own for count, own in zip(whole, kept, strict=True)]


def tokens_unknown(inputs: Any, tokenizer: Any) -> list[int] | None:
    """How many tokens of each input are unknown to the tokenizer; None if it has no unknown
    token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        return None
    # Hand-made tokenizers often pad with the unknown token.
    found = inputs["input_ids"] == unknown  # [B, L]
    if "attention_mask" in inputs:
        found = found & inputs["attention_mask"].bool()
    return found.sum(1).tolist()


def names_of_tokens(inputs: Any, tokenizer: Any) -> list[list[str]] | None:
    """The tokens of each input, without padding; None if there are none."""
    if tokenizer is None or not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        return None
    mask = inputs.get("attention_mask")
    rows = []
    for position, ids in enumerate(inputs["input_ids"].tolist()):
        names = tokenizer.convert_ids_to_tokens(ids)
        if mask is not None:
            kept = mask[position].tolist()
            names = [name for name, keep in zip(names, kept, strict=True) if keep]
        rows.append([str(name) for name in names])
    return rows
