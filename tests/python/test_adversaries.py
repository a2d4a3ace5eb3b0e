"""Some thousands of the cases of support/adversaries.py, new ones in each run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import adversaries

#: Cases of each kind: as many as run in a minute in total.
CASES = {
    "gate_configuration": 300,
    "plan": 1500,
    "structure_plan": 800,
    "model_folder": 300,
    "safetensors_file": 1500,
    "data_file": 500,
    "operator_arguments": 2000,
}


@pytest.mark.parametrize("kind", adversaries.KINDS)
def test_bad_input_is_refused_with_one_sentence(kind, tmp_path):
    @settings(
        max_examples=CASES[kind],
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.integers(0, 2**48))
    def check(number):
        adversaries.run_case(kind, number, tmp_path)

    check()


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (ValueError("keep must be in (0, 1], got 2"), None),
        (KeyError("layers"), "KeyError is none of the errors"),
        (ValueError("x" * 500), "500 characters long"),
        (ValueError("got \x1b[2J"), "cannot be printed"),
        (ValueError("two\nlines"), "cannot be printed"),
        (RuntimeError(), "says nothing"),
    ],
)
def test_what_an_answer_must_be(error, wrong):
    found = adversaries.judge(error)
    assert found is None if wrong is None else wrong in found
