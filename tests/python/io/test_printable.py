"""Names and paths in messages."""

import re
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise import _C
from headwise.io.printable import layer_called, path_called

LONG = ["x" * 5000, "x/" * 2500, "x\n\x1b[2J" * 40]


@pytest.mark.parametrize("path", LONG, ids=["long", "deep", "control"])
@pytest.mark.parametrize(
    "read",
    [
        hw.load,
        hw.HeadPlan.load,
        lambda path: hw.HeadPlan([]).save(path + "/" if path == LONG[2] else path),
        lambda path: hw.serialization.write_card(path, torch.nn.Linear(1, 1)),
    ],
    ids=["load", "HeadPlan.load", "HeadPlan.save", "write_card"],
)
def test_a_path_that_is_none_is_not_quoted_whole(read, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as caught:
        read(path)
    text = str(caught.value)
    assert len(text) < 500 and text.isprintable()


def test_names():
    assert layer_called("encoder.0") == "layer 'encoder.0'"
    assert layer_called("") == "the layer"
    assert len(layer_called("x" * 5000)) < 120
    assert path_called("a\nb") == "'a\\nb'"


def test_a_model_that_is_itself_a_layer_is_not_called_by_an_empty_name(tmp_path):
    layer = hw.MultiheadAttention(8, 4, gate=hw.BudgetGate())
    for call in (
        lambda: hw.plan_from_gates(layer),
        lambda: hw.prune(layer, hw.HeadPlan([hw.pruning.LayerPlan("", 5, [0], [1.0])])),
    ):
        with pytest.raises((ValueError, TypeError), match="the layer") as caught:
            call()
        assert "''" not in str(caught.value)
    hw.save(layer, tmp_path / "model")
    with pytest.raises(ValueError, match="of the layer is 4 in model and 8 in the file|embed_dim"):
        hw.load(tmp_path / "model", hw.MultiheadAttention(4, 4))


NAN = torch.tensor([float("nan")] * 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: _C.FisherAccumulator().add("", NAN),
            "gradient of the layer must be finite, got NaN or infinity: is the loss?",
        ),
        (lambda: _C.FisherAccumulator().scores(""), "nothing was added for the layer"),
        (lambda: _C.Trace().history(""), "no selection was recorded for the layer"),
        (
            lambda: hw.plan(hw.HeadScores("m", {"": NAN})),
            "scores must be finite, got nan for head 0 of the layer",
        ),
        (
            lambda: hw.HeadPlan([hw.pruning.LayerPlan("", 2, [5], [1.0])]),
            "heads in plan of the layer must be between 0 and 1, got 5",
        ),
        (
            lambda: hw.start_gates(
                hw.MultiheadAttention(8, 4, gate=hw.BudgetGate()), {"": NAN}, 0.5
            ),
            "importance of the layer must be finite, got NaN or infinity",
        ),
        (
            lambda: hw.start_gates(hw.MultiheadAttention(8, 4, gate=hw.BudgetGate()), {}, 0.5),
            "importance must have a score for the layer",
        ),
    ],
)
def test_the_core_does_not_call_a_layer_by_an_empty_name(call, text):
    with pytest.raises((ValueError, IndexError), match=f"^{re.escape(text)}$"):
        call()


def test_every_message_names_layers_by_layer_called():
    """Quotes around a name by hand would be empty for a model that is itself a layer, and of any
    length."""
    root = Path(__file__).resolve().parents[3]
    own = re.compile(r"""layer '"|of layer "(,| \+) shown|layer '?\{[^}]*name""")
    files = [*(root / "src").rglob("*.cpp"), *(root / "python/headwise").rglob("*.py")]
    found = [
        f"{path.name}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if own.search(line) and path.name != "printable.py"
    ]
    assert len(files) > 200 and found == []
