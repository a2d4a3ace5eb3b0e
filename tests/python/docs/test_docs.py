"""Every example of README.md and docs/ runs, and prints what the page says it prints.

- ```python blocks of one page run in order in one namespace, in an empty folder. A ```text block
  that follows one directly is what it prints; `...` in it stands for anything.
- ```cpp blocks are copied word for word from a file of examples/ or tests/, where they are
  compiled and run.
- `headwise ...` lines of ```console blocks are commands that the command line accepts.
- Links between pages lead somewhere.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[str, str, int, bool]]:
    """(language, text, line, whether only white space is between it and the last block)."""
    source, found, end = page.read_text(encoding="utf-8"), [], 0
    for match in FENCE.finditer(source):
        follows = bool(found) and not source[end : match.start()].strip()
        found.append((match[1], match[2], source.count("\n", 0, match.start()) + 1, follows))
        end = match.end()
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def has(language: str) -> list[Path]:
    return [page for page in PAGES if any(block[0] == language for block in blocks(page))]


@pytest.mark.parametrize("page", has("python"), ids=name)
def test_python_examples_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    found = blocks(page)
    for position, (language, text, line, _) in enumerate(found):
        if language != "python":
            continue
        # Padding with empty lines makes a traceback point at the page's own line.
        code = compile("\n" * line + text, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        following = found[position + 1] if position + 1 < len(found) else ("", "", 0, False)
        if following[0] == "text" and following[3]:
            agree = doctest.OutputChecker().check_output(
                following[1],
                printed.getvalue(),
                doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
            )
            assert agree, f"{name(page)}:{line} printed\n{printed.getvalue()}\nnot\n{following[1]}"


@pytest.mark.parametrize("page", has("cpp"), ids=name)
def test_cpp_examples_are_compiled_somewhere(page):
    def plain(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    sources = [
        plain(source.read_text(encoding="utf-8"))
        for folder in ("examples", "tests")
        for source in (ROOT / folder).rglob("*.cpp")
    ]
    for language, text, line, _ in blocks(page):
        if language == "cpp":
            assert any(plain(text) in source for source in sources), (
                f"{name(page)}:{line} is in no .cpp file of examples/ or tests/"
            )


@pytest.mark.parametrize("page", has("console"), ids=name)
def test_commands_are_accepted(page):
    from headwise.apps.cli import build_parser

    for language, text, line, _ in blocks(page):
        if language != "console":
            continue
        for command in re.findall(r"^\$ (headwise .*)$", text, re.MULTILINE):
            with contextlib.redirect_stderr(io.StringIO()) as complaint:
                try:
                    build_parser().parse_args(shlex.split(command)[1:])
                except SystemExit as stop:
                    assert stop.code == 0, f"{name(page)}:{line} {command}: {complaint.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"
