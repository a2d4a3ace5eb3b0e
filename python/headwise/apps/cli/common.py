"""Common parts of the subcommands: options, devices, threads, and errors."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from headwise.apps.tasks.errors import UsageError
from headwise.io.printable import printable, quoted
from headwise.io.store import locked

T = TypeVar("T", int, float)


def say(text: str, file=None) -> None:
    """Prints lines that may hold file names, labels and texts: no control character reaches the
    terminal."""
    print("\n".join(printable(line, 100_000) for line in text.split("\n")), file=file, flush=True)


def number(text: str, kind: Callable[[str], T], fits: Callable[[T], bool], rule: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what}, got {quoted(text)}") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return value


def share(text: str) -> float:
    """A share of the heads, above 0 and at most 1."""
    return number(text, float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def positive(text: str) -> int:
    """A positive whole number."""
    return number(text, int, lambda value: value > 0, "positive")


def seed(text: str) -> int:
    """A whole number, not negative."""
    return number(text, int, lambda value: 0 <= value < 2**31, "between 0 and 2147483647")


def add_model(parser: argparse.ArgumentParser, what: str = "a fine-tuned classifier") -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"{what}: from headwise.save, or of transformers",
    )


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


def add_energy(group) -> None:
    """The options of measuring energy."""
    group.add_argument(
        "--energy",
        action="store_true",
        help="also measure energy, with the package zeus; where no counter can be read: proxies",
    )
    group.add_argument(
        "--energy-seconds",
        type=window_seconds,
        metavar="S",
        help="length of a window, at least 10 (default: 10); needs --energy",
    )
    group.add_argument(
        "--energy-rounds",
        type=positive,
        metavar="N",
        help="windows of each contender (default: 3); needs --energy",
    )


def window_seconds(text: str) -> float:
    """A finite number, at least 10: shorter windows are within the error of the counters."""
    from headwise.apps.energy.windows import LEAST_SECONDS

    fits = lambda value: LEAST_SECONDS <= value <= 3600  # noqa: E731
    return number(text, float, fits, "between 10 and 3600 seconds")


def energy_windows(options: argparse.Namespace):
    """The windows that the options ask for; None without --energy.

    Raises:
        UsageError: windows without --energy.
    """
    from headwise.apps.energy.windows import Windows

    given = {"seconds": options.energy_seconds, "rounds": options.energy_rounds}
    given = {name: value for name, value in given.items() if value is not None}
    if options.energy:
        return Windows(**given)
    for name in given:
        raise UsageError(f"--energy-{name} needs --energy")
    return None


def add_labels_are(parser) -> argparse.Action:
    """The option that says how to read labels that could be names or numbers of classes."""
    return parser.add_argument(
        "--labels-are",
        choices=("names", "numbers"),
        help="of the model's classes; needed only if the data's labels could be both",
    )


def use_threads(wanted: int | None) -> int:
    """Sets and returns the number of threads of PyTorch's operators."""
    import torch

    if wanted is None:
        try:
            wanted = len(os.sched_getaffinity(0))
        except AttributeError:  # not on Linux
            wanted = os.cpu_count() or 1
        # The user may have set OMP_NUM_THREADS.
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
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {quoted(name)}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {quoted(name)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def loaded(options: argparse.Namespace, example: str | None = "text"):
    """The trained model that ``options`` name, in evaluation mode, and its device; sets the threads
    and the seed. ``example``: what it classifies; see
    :func:`headwise.apps.tasks.models.load_trained`.

    Raises:
        UsageError: there is no such device or model.
    """
    import torch

    from headwise.apps.tasks.models import load_trained

    device = use_device(options.device)
    use_threads(options.threads)
    torch.manual_seed(options.seed)
    if not options.model.is_dir():
        raise UsageError(f"there is no model folder {options.model}")
    return load_trained(options.model, example).to(device).eval(), device


def writable_outputs(options: argparse.Namespace) -> None:
    """Raises an error, before any work is done, if --json or --out cannot be written."""
    writable_file(options.json)
    if options.out is not None:
        writable_folder(options.out)


def writable_file(path: Path | None) -> None:
    """Raises an error for a file name whose folder does not exist, before any work is done."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: no permission for the folder {path.parent}")


def need_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """Raises an error, before any work is done, if a needed package is missing.

    Raises:
        UsageError: a package is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{what} needs the package {package}: pip install 'headwise[{extra}]'")


def writable_folder(path: Path) -> Path:
    """Makes the folder, and a test file in it.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the folder {path}: {error.strerror}") from None
    return path


@contextlib.contextmanager
def own_folder(path: Path | None) -> Iterator[None]:
    """Locks a folder for this run.

    Raises:
        UsageError: another run is using it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        yield
