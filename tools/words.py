"""Finds the phrases of tools/words.txt, which the project does not write, in Markdown files and in
the comments, docstrings and string literals of code.

    words.py [FILE...]      default: every file of FOLDERS, to which the check is limited

Prints FILE:LINE, the phrase and what to write instead. Exit status 1 if there are any.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "words.txt"
FOLDERS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"),
    *("include", "src", "python/headwise", "python/bindings"),
    *("benchmarks", "examples", "tests", "tools"),
)
#: In these files, phrases are data.
EXEMPT = (
    "examples/python/prune.py",
    "examples/python/train_gate.py",
    "tests/python/tools/test_words.py",
)
SUFFIXES = {".md", ".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".js"}
#: A comment or a string, of Python or C++, from left to right.
PROSE = {
    True: re.compile(r'"""(.*?)"""|"((?:\\.|[^"\\\n])*)"|\'((?:\\.|[^\'\\\n])*)\'|#([^\n]*)', re.S),
    False: re.compile(r'/\*(.*?)\*/|//+<?([^\n]*)|R"\w*\((.*?)\)\w*"|"((?:\\.|[^"\\\n])*)"', re.S),
}


@functools.cache
def table() -> list[tuple[re.Pattern[str], str]]:
    """(phrase, what to write instead)."""
    rows = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            phrase, _, instead = line.rpartition(" | ")
            rows.append((re.compile(phrase.replace(" ", r"\s+"), re.IGNORECASE), instead))
    return rows


def prose(text: str, suffix: str) -> str:
    """``text`` with the same lines, in which code is ``|``, and what begins a comment or a string
    is a space: phrases are found across lines and adjacent strings, but not across code."""
    if suffix == ".md":
        return text
    parts, end = [], 0
    for match in PROSE[suffix.startswith(".py")].finditer(text):
        group = match.lastindex or 0
        parts.append(re.sub(r"\S+", "|", text[end : match.start()]))
        before, after = match.start(group) - match.start(), match.end() - match.end(group)
        parts += [" " * before, match[group], " " * after]
        end = match.end()
    return "".join([*parts, re.sub(r"\S+", "|", text[end:])])


def found(text: str, suffix: str) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, what to write instead)."""
    words = prose(text, suffix)
    for phrase, instead in table():
        for match in phrase.finditer(words):
            yield words.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def files() -> list[Path]:
    paths = [ROOT / name for name in FOLDERS]
    inside = [path for folder in paths for path in sorted(folder.rglob("*"))]
    exempt = {ROOT / name for name in EXEMPT}
    return [
        path
        for path in paths + inside
        if path.is_file() and path.suffix in SUFFIXES and path not in exempt
    ]


def main(arguments: list[str]) -> int:
    count = 0
    only = {Path(name).resolve() for name in arguments}
    for path in files():
        if only and path not in only:
            continue
        for line, phrase, instead in sorted(found(path.read_text("utf-8"), path.suffix)):
            print(f'{path.relative_to(ROOT)}:{line}: "{phrase}": write {instead}')
            count += 1
    print(f"words: {count} phrases to reword" if count else "words: nothing to reword")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
