"""What the subcommands share: options, devices, threads, and how they fail."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from headwise.apps.tasks.errors import UsageError


def share(text: str) -> float:
    """A share of the heads, above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def positive(text: str) -> int:
    """A positive whole number."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def seed(text: str) -> int:
    """A whole number, not negative."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2147483647, got {text}")
    return value


def add_common(
    parser: argparse.ArgumentParser, out: str | None, several_threads: bool = False
) -> None:
    """The options that every subcommand has.

    Args:
        out: default of ``--out``.
        several_threads: ``--threads`` takes several numbers, to measure each.
    """
    group = parser.add_argument_group("running")
    group.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else None,
        metavar="DIR",
        help=f"folder for what is written (default: {out})"
        if out
        else "folder for what is written",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    group.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    group.add_argument(
        "--threads",
        type=positive,
        nargs="+" if several_threads else None,
        metavar="N",
        help="default: the cores that may be used",
    )


def use_threads(wanted: int | None) -> int:
    """Sets and returns the number of threads of PyTorch's operators."""
    import torch

    if wanted is None:
        try:
            wanted = len(os.sched_getaffinity(0))
        except AttributeError:  # not on Linux
            wanted = os.cpu_count() or 1
        # OMP_NUM_THREADS is somebody's decision too.
        wanted = min(wanted, torch.get_num_threads())
    torch.set_num_threads(wanted)
    return wanted


def use_device(name: str):
    """The torch device of that name.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def writable_file(path: Path | None) -> None:
    """Refuses a file name whose folder does not exist, before any work is done."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: no permission for the folder {path.parent}")
