"""src/ops/schemas.cpp declares every operator, and each exists."""

from __future__ import annotations

import re
from pathlib import Path

import headwise  # noqa: F401  (loads the operators)
import pytest
import torch

SOURCES = Path(__file__).resolve().parents[3] / "src"
SCHEMAS = SOURCES / "ops" / "schemas.cpp"


def declared() -> set[str]:
    """The names in the file; a loop over prefixes declares each of them."""
    text = SCHEMAS.read_text(encoding="utf-8")
    names = set(re.findall(r'\bm\.def\(\s*"(\w+)\(', text))
    names |= set(re.findall(r'\bdef\("(\w+)" \+', text))
    for variable, prefixes in re.findall(r"for \(const std::string (\w+) : \{(.*?)\}\)", text):
        stems = re.findall(rf'\bdef\({variable} \+\s*"(\w+)\(', text)
        assert stems
        names |= {prefix.strip('"') + stem for prefix in prefixes.split(", ") for stem in stems}
    return names


def registered() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix("headwise::") for s in schemas if s.name.startswith("headwise::")}


def test_every_operator_is_declared_in_the_file_and_every_declaration_is_registered():
    assert len(declared()) > 100
    assert declared() == registered()


def test_no_other_file_declares_operators():
    others = [
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.cpp")
        if path != SCHEMAS
        and re.search(r"TORCH_LIBRARY(_FRAGMENT)?\(|\bm\.def\(", path.read_text(encoding="utf-8"))
    ]
    assert not others


@pytest.mark.parametrize("name", sorted(declared() - {"_work_list"}))
def test_every_operator_runs_somewhere_on_a_cpu(name):
    """A kernel for the CPU, or one made of other operators."""
    keys = ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert any(has(f"headwise::{name}", key) for key in keys)
