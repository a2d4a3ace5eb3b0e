"""The task ``translation``: the messages of a program, English to German."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import MARIAN
from headwise.apps.tasks.tasks import Task

_VERSION = "2026.11.0"
_WHEEL = f"homeassistant-{_VERSION}-py3-none-any.whl"
#: Words of a message: shorter ones are names, longer ones are rare.
_WORDS = range(3, 17)
#: Messages with code, a place for a value or a link are left out.
_MARKED = re.compile(r"[{\n<`*\[]|http")

#: Of the tokenizer.
PAD, END = "<pad>", "</s>"
_VOCABULARY = 3000


def _folder() -> Path:
    return Path(sys.prefix) / "share" / "headwise" / "data"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, str):
        yield path, value


def catalogue(wheel: Path) -> dict[str, str]:
    """English message -> its German translation (the most frequent one), in the order of the files.

    Args:
        wheel: of homeassistant; it is read as an archive, and nothing in it is run.

    Raises:
        UsageError: it is no such archive.
    """
    found: dict[str, Counter[str]] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            for english in sorted(name for name in names if name.endswith("/translations/en.json")):
                german = english.removesuffix("en.json") + "de.json"
                if german not in names:
                    continue
                ours, theirs = (
                    dict(_leaves(json.loads(archive.read(n)))) for n in (english, german)
                )
                for path, message in ours.items():
                    if theirs.get(path, message) != message:
                        found.setdefault(message, Counter())[theirs[path]] += 1
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{wheel} cannot be read: {error}; fetch it again") from None
    return {message: counts.most_common(1)[0][0] for message, counts in found.items()}


def _kind(message: str) -> str:
    """The same for messages that differ in numbers, capitals and punctuation alone."""
    return " ".join(re.findall(r"[a-z]+", message.lower()))


def translation() -> Task:
    """Messages of Home Assistant's user interface (Apache 2.0), three to sixteen words long, and
    their German translations by its users.

    Messages that differ in numbers, capitals and punctuation alone stay together. Their archive is
    downloaded, not installed.

    Raises:
        UsageError: it is not there.
    """
    wheel = _folder() / _WHEEL
    if not wheel.is_file():
        raise UsageError(
            "the messages are not installed; fetch them with: "
            f"{sys.executable} -m pip download homeassistant=={_VERSION} --no-deps "
            f"--ignore-requires-python -d {_folder()}"
        )
    pairs = [
        (message.strip(), german.strip())
        for message, german in catalogue(wheel).items()
        if len(message.split()) in _WORDS and german.strip()
        if not _MARKED.search(message) and not _MARKED.search(german)
    ]
    return pair_task("translation", "messages: English to German", pairs)


def pair_task(name: str, title: str, pairs: Sequence[tuple[str, str]]) -> Task:
    """A task of (source, target) texts."""
    return Task(
        name=name,
        title=title,
        inputs=tuple(source for source, _ in pairs),
        labels=(0,) * len(pairs),
        groups=tuple(_kind(source) for source, _ in pairs),
        classes=(),
        targets=tuple(target for _, target in pairs),
        example="message",
        model=MARIAN,
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int = _VOCABULARY) -> Any:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of both languages; the same
    texts give the same one.

    Returns:
        A tokenizer of transformers, which appends the end of a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
