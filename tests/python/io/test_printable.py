"""Names and paths in messages."""

import headwise as hw
import pytest
import torch
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
