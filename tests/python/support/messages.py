"""A tiny parallel text, and the archive that the task of translations reads."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

WORDS = {
    "red": "rot", "green": "grün", "open": "öffne", "the": "die", "door": "Tür", "big": "groß",
    "close": "schließe", "window": "Fenster", "now": "jetzt", "small": "klein", "router": "router",
}  # fmt: skip


def message_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different messages of three to eight words, translated word by word."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        words = generator.choices(list(WORDS), k=generator.randint(3, 8))
        found[" ".join(words)] = " ".join(WORDS[word] for word in words)
    return list(found.items())


def write_wheel(path: Path, parts: dict[str, tuple[dict, dict]]) -> Path:
    """An archive with the English and the German messages of each part; German may be None."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("homeassistant/const.py", "raise SystemExit\n")
        for name, (english, german) in parts.items():
            folder = f"homeassistant/components/{name}/translations"
            archive.writestr(f"{folder}/en.json", json.dumps(english))
            if german is not None:
                archive.writestr(f"{folder}/de.json", json.dumps(german))
    return path
