"""Progress bars: at once if asked for, after two seconds on a terminal, else never."""

import sys

import pytest
from headwise.io import progress


class Terminal:
    def __init__(self, watched):
        self.text, self._watched = "", watched

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self._watched


class OutStream(Terminal):
    __module__ = "ipykernel.iostream"


def shown(monkeypatch, stream, show, patience=0.0):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    assert list(progress.with_progress([1, 2, 3], "counting", "number", show)) == [1, 2, 3]
    return "counting" in stream.text


@pytest.mark.parametrize(
    ("stream", "show", "expected"),
    [
        (Terminal(True), None, True),
        (Terminal(False), None, False),
        (OutStream(False), None, True),
        (Terminal(False), True, True),
        (Terminal(True), False, False),
    ],
)
def test_who_sees_a_bar(monkeypatch, stream, show, expected):
    assert shown(monkeypatch, stream, show) == expected


def test_what_is_quick_shows_no_bar_unless_asked(monkeypatch):
    assert progress.PATIENCE == 2.0
    assert not shown(monkeypatch, Terminal(True), None, patience=60.0)
    assert shown(monkeypatch, Terminal(True), True, patience=60.0)


def test_a_stream_without_isatty_and_items_without_a_length(monkeypatch):
    monkeypatch.setattr(sys, "stderr", object())
    assert list(progress.with_progress(iter("ab"), "x", "letter", None)) == ["a", "b"]


def test_an_error_closes_the_bar(monkeypatch):
    stream = Terminal(True)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyError):
        for _ in progress.with_progress([1, 2], "counting", "number", True):
            raise KeyError
    assert stream.text.endswith("\r")
