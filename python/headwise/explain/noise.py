"""Small changes to texts that keep their meaning, to measure how stable selections are."""

from __future__ import annotations

import random
from collections.abc import Callable


def drop_words(text: str, generator: random.Random, share: float = 0.1) -> str:
    """Drops each word with probability ``share``; at least one word stays."""
    words = text.split()
    kept = [word for word in words if generator.random() >= share]
    return " ".join(kept or words[:1])


def change_case(text: str, generator: random.Random, share: float = 0.5) -> str:
    """Puts each word in capitals with probability ``share``."""
    return " ".join(word.upper() if generator.random() < share else word for word in text.split())


def misspell(text: str, generator: random.Random, share: float = 0.1) -> str:
    """Swaps two neighbouring letters in each word of at least four letters, with probability
    ``share``."""
    return " ".join(_exchange(word, generator, share) for word in text.split())


def _exchange(word: str, generator: random.Random, share: float) -> str:
    if len(word) < 4 or generator.random() >= share:
        return word
    place = generator.randrange(1, len(word) - 2)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "word drop-out": drop_words,
    "capitals": change_case,
    "misspelling": misspell,
}
