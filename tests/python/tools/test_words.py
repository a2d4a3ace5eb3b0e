"""tools/words.py finds the phrases of its table in prose, and nothing in code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "words.py"
_spec = importlib.util.spec_from_file_location("words", TOOL)
words = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(words)


def phrases(text: str, suffix: str) -> list[tuple[int, str]]:
    return [(line, phrase) for line, phrase, _ in words.found(text, suffix)]


@pytest.mark.parametrize(
    "wrong",
    [
        "with a score a head",
        "read once a call",
        "the file says so",
        "the block is gone",
        "what stands here",
        "as many heads, and no more",
        "it makes up for that",
        "It goes on from there",
        "threads a block",
        "null where wanted",
    ],
)
def test_a_phrase_of_the_table_is_found(wrong):
    assert len(phrases(f"Text.\n{wrong}.\n", ".md")) == 1
    assert phrases(f'x = 1\n"""{wrong}"""\n', ".py")[0][0] == 2
    assert phrases(f"int x;\n/// {wrong}\n", ".h")[0][0] == 2
    assert phrases(f'x = f("{wrong}")\n', ".py") and phrases(f'f("{wrong}");\n', ".cpp")


@pytest.mark.parametrize(
    "right",
    [
        "one score per head, once per call",
        "a stand-in stands in for what it stands for",
        "as many heads as layers",
        "give a layer a head",
        "A hundred goals",
    ],
)
def test_other_words_are_left_alone(right):
    assert not phrases(right, ".md")


def test_phrases_are_found_across_lines_but_not_in_or_across_code():
    assert phrases('f(\n    "what "\n    "went"\n)', ".py") == [(2, "what went")]
    assert phrases("# it goes on\n# from there", ".py") == [(1, "goes on from")]
    assert phrases("// it goes on\n// from there", ".cpp") == [(1, "goes on from")]
    assert not phrases("gone = shut(stands, nobody)  # a mask", ".py")
    assert not phrases('f("what", "went")', ".py")


def test_every_row_of_the_table_has_a_phrase_and_what_to_write():
    rows = words.table()
    assert rows and all(instead and not phrase.search("") for phrase, instead in rows)
