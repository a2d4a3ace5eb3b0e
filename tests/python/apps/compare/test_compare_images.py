"""``headwise compare`` on inputs that are no texts: every method, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.compare import metrics, settings
from headwise.apps.compare.methods import METHODS
from headwise.apps.tasks.registry import BUNDLED
from support.images import write_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study of every method on a few images."""
    folder = tmp_path_factory.mktemp("images")
    data = write_images(folder / "bars.npz", 150)
    original = settings.preset

    def preset(size: str, seed: int) -> settings.Settings:
        return dataclasses.replace(original(size, seed), latency_s=0.01)

    command = [
        "compare", "--data", data, "--out", folder / "out", "--quick", "--metric", "matthews",
        "--steps", 3, "--dense-steps", 6, "--score-limit", 32, "--methods", "all", "--keep-models",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "preset", preset)
        patch.setattr(metrics, "RESAMPLES", 5)
        assert main([str(part) for part in command]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_every_method_runs_on_images(results):
    assert {run["method"] for run in results["runs"]} == {"dense", *METHODS} - {"cofi"}
    for run in results["runs"]:
        assert run["model"] == "small ViT" and run["macs_ratio_to_dense"] > 0
        if METHODS.get(run["method"]) and METHODS[run["method"]].kind == "static":
            assert "share_kept" in run or run["heads_mean"] == 0.5
    (task,) = results["tasks"]
    assert task["examples"] == "images" and task["train"] + task["validation"] + task["test"] == 150
    assert results["model"] == {"name": "small ViT", "layers": 4, "heads": 24, "width": 96}
    assert [room["task"] for room in results["headroom"]] == ["bars"]
    assert [shape["length"] for shape in results["settings"]["shapes"]] == [None, None]


def test_the_metric_is_in_the_results_beside_accuracy(results):
    for run in results["runs"]:
        assert set(run["metric"]) == {"name", "value", "validation"}
        assert -1 <= run["metric"]["value"] <= 1 and 0 <= run["accuracy"] <= 1
    entry = results["summary"][0]
    assert entry["metric"]["low"] <= entry["metric"]["value"] <= entry["metric"]["high"]
    (tile,) = [t for t in results["verdicts"][0]["tiles"] if t["label"] != "time"][:1]
    assert tile["label"] == "Matthews correlation"
    assert any("of Matthews correlation" in sentence for sentence in results["findings"])


def test_models_of_images_are_kept(finished, results):
    folders = {folder.name for folder in (finished / "models").iterdir()}
    assert len(folders) == len(METHODS) - 1
    x = torch.zeros(2, 1, 8, 8)
    for name in ("bars-michel-finetuned-0.5-0", "bars-budget-gate-0.5-0"):
        model = hw.load(finished / "models" / name)
        with hw.trace(model) as trace:
            assert model(pixel_values=x).logits.shape == (2, 3)
        assert bool(trace.selections) == ("budget" in name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-length", "9"], "--max-length is of texts; the inputs of a small ViT"),
        (["--methods", "cofi"], "the method cofi is for text encoders, not for a small ViT"),
        (["--group", "film"], "are of texts; an .npz file has the arrays x and y"),
        (["--model", "m"], "the task bars trains a model of its own: leave out --model"),
    ],
)
def test_options_of_texts_are_refused_for_images(tmp_path, arguments, says, capsys):
    data = write_images(tmp_path / "bars.npz")
    command = ["compare", "--data", str(data), "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_tasks_with_different_models_are_refused(tmp_path, capsys):
    command = ["compare", "--task", "topics", "digits", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "digits has a model of its own: give it alone, not with topics" in told


def test_help_lists_every_task(capsys):
    assert main(["compare", "--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(BUNDLED)} (default: reviews)" in listed.replace("- ", "-")
    assert {"mixed-domains", "instructions", "digits", "speech"} <= set(BUNDLED)
