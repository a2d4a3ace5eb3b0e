"""Untrusted gate configurations: one clear sentence, never an internal error."""

import copy
import math

import headwise as hw
import pytest
import torch
from headwise.gates import BankGate, gate_from_config
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gates import EVERY_GATE

OTHERS = [hw.ThresholdGate(), hw.GroupGate(hw.BudgetGate()), BankGate([[0], [1, 2]])]
TYPES = sorted({type(gate).__name__ for gate in [*EVERY_GATE, *OTHERS]})
CONFIGS = [gate.config() for gate in [*EVERY_GATE, *OTHERS]]
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**30), 2**31, 2**63, 0, -1, 1, 0.0, 1e308, 5e-324])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["model", "layer", "all", "x" * 5000, "\x1b[2J", "\0", "012", "0.5", *TYPES])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["type", "gate", "keep"]), inner, max_size=4
        )
        | st.fixed_dictionaries(
            {"type": st.sampled_from(TYPES)}, optional={"gate": inner, "shared": inner}
        )
    ),
    max_leaves=8,
)


def refused(config):
    """None, or the sentence that refuses it."""
    try:
        gate = gate_from_config(config)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert 10 < len(text) < 500 and text.isprintable(), text[:600]
        # Not one of Python's own messages.
        for foreign in (
            "__init__",
            "argument",
            "unhashable",
            "NoneType",
            "object is not",
            "int()",
            "float()",
        ):
            assert foreign not in text, text
        return text
    assert gate_from_config(gate.config()).config() == gate.config()
    return None


@settings(max_examples=600, deadline=None)
@given(config=values)
def test_anything(config):
    refused(config)


@settings(max_examples=1500, deadline=None)
@given(data=st.data(), config=st.sampled_from(CONFIGS), value=values)
def test_a_known_configuration_with_one_value_changed(data, config, value):
    config = copy.deepcopy(config)
    if "gate" in config and data.draw(st.booleans()):
        inner = config["gate"]
        inner[data.draw(st.sampled_from(sorted(inner)))] = value
    else:
        config[data.draw(st.sampled_from(sorted(config)))] = value
    refused(config)


@pytest.mark.parametrize(
    "config, text",
    [
        (None, "a gate's configuration must be a mapping, got None"),
        ([], "a gate's configuration must be a mapping, got []"),
        ({}, "got None"),
        ({"type": ["BudgetGate"]}, "got ['BudgetGate']"),
        ({"type": "SharedHeadsGate"}, "SharedHeadsGate must be given its option 'gate'"),
        ({"type": "FixedGate", "heads": [0.9]}, "heads must be a whole number, got 0.9"),
        (
            {"type": "FixedGate", "heads": "012"},
            "heads must be a sequence of numbers, got '012'",
        ),
        ({"type": "FixedGate", "heads": [True, False]}, "heads must be a number, got True"),
        ({"type": "FixedGate", "heads": [-1]}, "heads must be in 0..H-1, got -1"),
        ({"type": "FixedGate", "scale": [1e999]}, "scale must be finite, got inf"),
        ({"type": "FixedGate", "scale": ["1"]}, "scale must be a number, got '1'"),
        (
            {"type": "SubsetGate", "k": 10**400},
            "k must be a whole number, got inf",
        ),
        ({"type": "SubsetGate", "k": 2.5}, "k must be a whole number, got 2.5"),
        ({"type": "BudgetGate", "strength": 10**400}, "strength must be finite and not negative"),
        ({"type": "BudgetGate", "hidden_dim": 2**40}, "hidden_dim must be between"),
        (
            {"type": "BudgetGate", "rounding": "x" * 9000},
            "rounding must be one of round, ceil, got 'xxx",
        ),
        ({"type": "BudgetGate", "hard_from": math.nan}, "hard_from must"),
        (
            {"type": "SharedHeadsGate", "gate": {"type": "BudgetGate"}, "shared": 10**12},
            "shared must",
        ),
        ({"type": "SharedHeadsGate", "gate": {"type": "BudgetGate"}, "shared": [1, 1]}, "1 again"),
        ({"type": "BankGate", "plans": "01"}, "plans must be a list, got '01'"),
        ({"type": "BankGate", "plans": [[0.9]]}, "plans: heads must be a whole number, got 0.9"),
        ({"type": "BankGate", "plans": [[1, 0]]}, "plans must be ascending heads, got [1, 0]"),
        ({"type": "BankGate", "plans": [[0]], "at": "x" * 5000}, "at must be a number of an"),
        ({"type": "BankGate", "plans": [[0]], "features": "x" * 5000}, "features must be a list"),
    ],
)
def test_refused_by_name(config, text):
    assert text in refused(config)


def test_nesting_has_an_end():
    config = {"type": "BudgetGate"}
    for _ in range(500):
        config = {"type": "SharedHeadsGate", "gate": config}
    assert "nested more than 8 deep" in refused(config)


@pytest.mark.parametrize(
    "heads", [[0.5], [True, False], torch.tensor([True, False]), "12", 3, {0: 1}]
)
def test_heads_are_whole_numbers(heads):
    with pytest.raises((TypeError, ValueError), match="heads must"):
        hw.FixedGate(heads)


@pytest.mark.parametrize("heads", [[2, 0], (2, 0), torch.tensor([2, 0]), {0, 2}, iter([2, 0])])
def test_heads_of_any_sequence(heads):
    assert hw.FixedGate(heads).bind(16, 4).scale.tolist() == [1, 0, 1, 0]
