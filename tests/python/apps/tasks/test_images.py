"""Tasks of images: the bundled digits, and files of a user's images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.images import task_from_npz
from headwise.apps.tasks.origins import Untrained
from headwise.apps.tasks.own_models import VIT, patch_size
from headwise.apps.tasks.registry import load_data, load_task
from support.images import write_images


def test_the_digits():
    task = load_task("digits")
    assert task.inputs.shape == (5000, 1, 28, 28) and task.example == "image"
    assert task.inputs.min() == -1 and task.inputs.max() == 1
    assert task.classes == tuple("0123456789") and set(Counter(task.labels).values()) == {500}
    assert len(set(task.labels[:60])) == 10  # not in the order of the file
    assert len(set(task.groups)) == 5000


def test_own_images(tmp_path):
    task = load_data(write_images(tmp_path / "bars.npz"), "text", "label", None)
    assert (task.name, task.classes, len(task)) == ("bars", ("0", "1", "2"), 90)
    assert task.inputs.shape == (90, 1, 8, 8) and task.labels[:4] == (0, 1, 2, 0)
    bright = task.inputs[1, 0, :, 2:5].mean()
    assert bright > 0 > task.inputs[1, 0, :, 5:].mean()


def test_images_with_colours_are_read_channels_last(tmp_path):
    x = np.zeros((20, 4, 4, 3), np.uint8)
    x[..., 2] = 255
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["up", "down"] * 10))
    task = task_from_npz(tmp_path / "a.npz")
    assert task.inputs.shape == (20, 3, 4, 4) and task.classes == ("down", "up")
    assert task.inputs[:, 2].min() == 1 and task.inputs[:, :2].max() == -1


_GOOD = {"x": np.zeros((20, 8, 8), np.uint8), "y": np.arange(20) % 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": None}, "a.npz needs the arrays x and y"),
        ({"x": np.zeros((20, 8, 9), np.uint8)}, r"x of a.npz must be uint8 \[N, side, side\]"),
        ({"x": np.zeros((20, 8, 8))}, r"got float64 \[20, 8, 8\]"),
        ({"x": np.zeros((20, 7, 7), np.uint8)}, "cut into 2 to 4 parts, got 7"),
        ({"y": np.arange(19) % 2}, r"y of a.npz must be 20 strings or whole numbers, got int64"),
        ({"y": np.zeros(20)}, r"got float64 \[20\]"),
        ({"y": np.arange(20) // 15}, "at least 10 images each, but '1' has 5"),
        ({"y": np.zeros(20, int)}, "at least two labels"),
        ({"y": np.array([None, 1] * 10, object)}, "is no .npz file of plain arrays"),
    ],
)
def test_images_that_cannot_be_used_are_refused(tmp_path, changes, says):
    arrays = {name: value for name, value in {**_GOOD, **changes}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=says):
        task_from_npz(tmp_path / "a.npz")


def test_files_that_are_no_arrays_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        task_from_npz(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(UsageError, match=r"a.npz is no .npz file of plain arrays"):
        task_from_npz(tmp_path / "a.npz")


def test_patches_cut_every_side_that_can_be_cut():
    assert [patch_size(side) for side in (28, 8, 32, 6, 9, 7, 1)] == [7, 2, 8, 2, 3, None, None]


def test_the_small_vit_takes_the_examples_and_has_the_positions_it_says(tmp_path):
    task = task_from_npz(write_images(tmp_path / "bars.npz"))
    origin = Untrained(VIT, task)
    examples = origin.examples(task, [3, 5, 4], 48)
    assert examples.labels.tolist() == [0, 2, 1] and examples.lengths == [17] * 3
    model = origin.model(task).eval()
    batch = examples.rows([2, 0]).batch([0, 1])
    with torch.no_grad():
        found = model(**batch.inputs, output_hidden_states=True)
        again = model(pixel_values=task.inputs[[4, 3]])
    assert torch.equal(found.logits, again.logits) and found.logits.shape == (2, 3)
    assert found.hidden_states[0].size(1) == 17
    assert examples.positions_of(batch.inputs).tolist() == [17, 17]
