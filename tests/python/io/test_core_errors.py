"""Wrong arguments of the C++ core: one sentence with the arguments that it takes and got."""

import inspect

import headwise as hw
import pytest
from headwise import _C
from headwise.io.core_errors import report_in_one_sentence
from headwise.pruning import LayerPlan


@pytest.mark.parametrize(
    ("call", "begins", "ends"),
    [
        (
            lambda: hw.set_cuda_routes(products=3),
            "set_cuda_routes() takes (attention: str = 'kernels', products: str = 'warps')",
            ", got (products=3)",
        ),
        (lambda: hw.set_cuda_routes("flash", "warps", 1), "set_cuda_routes() takes (", ", 1)"),
        (
            lambda: LayerPlan("x", "four", [0], [1.0]),
            "LayerPlan() takes (name: str, num_heads: int, heads: Sequence[int], scale: Sequence[",
            ", got ('x', 'four', [0], [1.0])",
        ),
        (lambda: hw.HeadPlan(3), "HeadPlan() takes (layers: Sequence[LayerPlan], ", ", got (3)"),
        (lambda: hw.HeadPlan.from_json(3), "HeadPlan.from_json() takes (text: str)", ", got (3)"),
        (lambda: hw.HeadPlan([]).save(), "HeadPlan.save() takes (path: ", ", got ()"),
        (lambda: hw.HeadPlan("\n" * 5000), "HeadPlan() takes (", "…)"),
    ],
)
def test_wrong_arguments_raise_one_sentence(call, begins, ends):
    with pytest.raises(TypeError) as refusal:
        call()
    text = str(refusal.value)
    assert text.startswith(begins) and text.endswith(ends)
    assert text.isprintable() and len(text) < 500


def callables():
    for name, value in vars(_C).items():
        if inspect.isclass(value):
            yield name, value
            for member in vars(value):
                if not member.startswith("_") and callable(getattr(value, member)):
                    yield f"{name}.{member}", getattr(value, member)
        elif callable(value) and not name.startswith("__"):
            yield name, value


@pytest.mark.parametrize(("name", "function"), callables())
def test_no_function_of_the_core_answers_in_several_lines(name, function):
    with pytest.raises(TypeError) as refusal:
        function(object(), no_such_argument="\x1b[31m")
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


def test_what_works_and_other_errors_are_unchanged():
    before = hw.set_cuda_routes()
    assert hw.set_cuda_routes(*before) == ("kernels", "warps")
    with pytest.raises(ValueError, match="attention must be 'kernels' or 'flash', got 'x'"):
        hw.set_cuda_routes("x")
    save = hw.HeadPlan.save
    report_in_one_sentence(_C)
    assert hw.HeadPlan.save is save
