"""``headwise score``, ``prune`` and ``explain`` on images and sounds."""

from __future__ import annotations

import json

import headwise as hw
import pytest
import torch
from headwise.apps.cli import explain, main
from headwise.apps.tasks import images, registry
from headwise.apps.tasks.origins import Untrained
from headwise.apps.tasks.own_models import AST
from headwise.apps.tasks.tasks import Task
from support.browser import browse
from support.images import write_images


def save(task, folder, gate=None):
    torch.manual_seed(0)
    model = hw.convert(Untrained(task.model, task).model(task).eval(), gate)
    for layer in hw.attention_layers(model).values():
        if layer.gate is not None:
            torch.nn.init.normal_(layer.gate.relevance.weight)
    hw.anneal(model, 1.0)
    hw.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "bars.npz")


@pytest.fixture(scope="module")
def gated(data):
    return save(images.task_from_npz(data), data.parent / "gated", hw.BudgetGate(budget=0.5))


@pytest.fixture(scope="module")
def plain(data):
    return save(images.task_from_npz(data), data.parent / "plain")


@pytest.fixture
def clips(monkeypatch):
    """The task ``speech`` with noise in the place of a synthesiser's words."""
    torch.manual_seed(1)
    labels = tuple(n % 2 for n in range(40))
    task = Task(
        name="speech", title="noise", inputs=torch.randn(40, 32, 16), labels=labels,
        groups=tuple(map(str, range(40))), classes=("no", "yes"), example="clip", model=AST,
    )  # fmt: skip
    own = registry.Bundled(lambda: task, AST)
    monkeypatch.setitem(registry.BUNDLED, "speech", own)
    return task


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_heads_are_scored_and_pruned_on_images(plain, data, tmp_path, capsys):
    scores = tmp_path / "scores"
    command = ["score", "--model", plain, "--data", data, "--metrics", "michel", "--keep", 0.5]
    assert run(*command, "--out", scores, "--limit", 40) == 0
    document = json.loads((scores / "scores.json").read_text())
    assert document["images"] == 40 and "texts" not in document
    batch = images.task_from_npz(data)
    plan = hw.HeadPlan.load(scores / "plan-michel.json")
    assert plan.heads_kept == 12
    small = tmp_path / "small"
    prune = ["prune", "--model", plain]
    assert run(*prune, "--plan", scores / "plan-michel.json", "--out", small) == 0
    assert run(*prune, "--keep", 0.5, "--data", data, "--out", tmp_path / "b") == 0
    with torch.no_grad():
        x = batch.inputs[:4]
        expected = hw.prune(hw.load(plain), plan)(pixel_values=x).logits
        torch.testing.assert_close(hw.load(small)(pixel_values=x).logits, expected)
    assert sum(m.num_heads for m in hw.attention_layers(hw.load(tmp_path / "b")).values()) == 12


def test_images_are_explained_by_their_patches(gated, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["explain", "--model", gated, "--data", data, "--row", 2, 0, "--out", out]
    assert run(*command, "--format", "html", "png") == 0
    shown = capsys.readouterr().out
    assert "image 2 of bars, labelled 2" in shown and "12 of 24 heads ran" in shown
    assert "heads ran for only one of the first two inputs" in shown
    document = json.loads((out / "explanation.json").read_text())
    first, second = document["inputs"]
    assert first["tokens"][:3] == ["[CLS]", "r0c0", "r0c1"] and len(first["tokens"]) == 17
    head = first["layers"][0]["heads"][0]
    assert head["constant"] + sum(head["shares"]) == pytest.approx(head["relevance"], abs=1e-4)
    picture = first["picture"]
    assert (picture["rows"], picture["columns"], picture["first"]) == (4, 4, 1)
    assert [len(picture["pixels"]), len(picture["pixels"][0])] == [8, 8]
    assert {min(map(min, picture["pixels"])), max(map(max, picture["pixels"]))} == {0, 255}
    # The bright bar of label 2 is on the right, that of label 0 on the left.
    columns = torch.tensor(picture["pixels"]).float().mean(0)
    assert columns[5:7].mean() > columns[:3].mean()
    assert second["text"] == "image 0 of bars, labelled 0"
    assert (out / "input-1-patches.png").stat().st_size > 5000
    seen = browse(
        (out / "explanation.html").read_text(),
        """
        const canvas = $("#head canvas"), brush = canvas.getContext("2d");
        const corner = [...brush.getImageData(2, 2, 1, 1).data];
        return { hidden: canvas.hidden, width: canvas.width, corner,
                 tokens: $$("#head .tokens li").length };
        """,
        tmp_path,
    )
    assert seen["problems"] == []
    assert seen["found"]["width"] == 256 and not seen["found"]["hidden"]
    assert seen["found"]["tokens"] == 17 and seen["found"]["corner"][3] == 255


def test_sounds_are_scored_pruned_and_explained(clips, tmp_path, capsys):
    model = save(clips, tmp_path / "model", hw.BudgetGate(budget=0.5))
    dense = save(clips, tmp_path / "dense")
    task = ["--task", "speech"]
    assert run("score", "--model", dense, *task, "--metrics", "michel", "--json",
               tmp_path / "s.json") == 0  # fmt: skip
    train = len(json.loads((tmp_path / "s.json").read_text())["scores"]["michel"])
    assert train == 4 and json.loads((tmp_path / "s.json").read_text())["clips"] < 40
    assert run("prune", "--model", dense, *task, "--keep", 0.5, "--out", tmp_path / "small") == 0
    assert run("explain", "--model", model, *task, "--row", 3, "--out", tmp_path / "o") == 0
    assert "clip 3 of speech, labelled yes" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "o" / "explanation.json").read_text())["inputs"]
    assert entry["tokens"][:4] == ["[CLS]", "[1]", "b0t0", "b0t1"]
    picture = entry["picture"]
    # A row per band, a column per frame.
    assert (picture["rows"], picture["columns"], len(picture["pixels"])) == (2, 4, 16)
    assert len(entry["tokens"]) == 2 + 8


def test_what_is_of_texts_is_refused(gated, plain, data, clips, tmp_path, tiny_model, capsys):
    own = ["--model", plain, "--data", data]
    cases = [
        (["score", "--model", plain], "give --data FILE or --task NAME, one of the two"),
        (["score", *own, "--task", "digits"], "give --data FILE or --task NAME, one of the two"),
        (["score", *own, "--text", "body"], "--text is of texts, not of images and sounds"),
        (["score", *own, "--max-length", 8], "--max-length is of texts, not of images and sounds"),
        (["score", "--model", tiny_model, "--data", data], "an image classifier is needed"),
        (["score", "--model", plain, "--task", "speech"], "a sound classifier is needed"),
        (["score", "--model", plain, "--data", "a.csv"], "a text classifier is needed"),
        (["explain", *own], "images are explained one by one, so it needs --row N: what heads do"),
        (["explain", *own, "--row", 900], "--row must be below 90, got 900"),
        (["explain", *own, "--row", 1, "--grid", 4, 4], "--grid is of texts, not of images"),
        (
            ["explain", "--model", tiny_model, "--text", "a", "--row", 1],
            "--row is of images",
        ),
    ]
    for command, message in cases:
        assert message in fails(capsys, *command), command
    other = write_images(tmp_path / "other.npz", side=12)
    assert fails(capsys, "score", "--model", plain, "--data", other) == (
        f"headwise score: the model in {plain} takes images of shape [1, 8, 8], but those of other "
        "have [1, 12, 12]"
    )


def test_a_large_picture_is_made_smaller():
    config = type("config", (), {"patch_size": 64})
    own = explain.patches("image", torch.rand(3, 256, 256), config)
    assert [len(own["pixels"]), len(own["pixels"][0])] == [128, 128]
    assert (own["rows"], own["columns"]) == (4, 4)
