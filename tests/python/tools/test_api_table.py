"""docs/api.md lists the names that there are."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def load():
    spec = importlib.util.spec_from_file_location("api_table", ROOT / "tools" / "api_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_current():
    table = load()
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), (
        "docs/api.md is out of date: run tools/api_table.py"
    )


def test_names_are_found_where_they_are():
    table = load()
    python, cpp = table.python_names(), table.cpp_names()
    assert python["MultiheadAttention"] == "hw.MultiheadAttention"
    assert cpp["MultiheadAttention"] == "multihead_attention.h" and cpp["BudgetGate"] == "gates.h"
    assert cpp["score_heads"] == "scoring.h" and cpp["HeadPlan"] == "pruning.h"
    assert "ablate_heads" in python and "ablate_heads" not in cpp
    assert not any(name.endswith(("Options", "Impl")) for name in cpp)
