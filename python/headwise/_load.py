"""Loads the C++ core, after checking that it was compiled for the torch that is running.

An extension depends on the binary interface of one minor version of torch. With another one, the
dynamic loader would report an undefined symbol, which does not tell what to do; so the version is
compared first, with that in ``_build_info.py``, written by CMake.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def minor_version(version: str) -> tuple[str, ...]:
    """The first two numbers of a version: ``"2.11.0+cu130"`` gives ``("2", "11")``."""
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch(compiled: str, running: str) -> None:
    """Raise an error if the two versions of torch differ in their first two numbers.

    Raises:
        ImportError: naming both versions and what to do.
    """
    if minor_version(compiled) != minor_version(running):
        wanted = ".".join(minor_version(compiled))
        raise ImportError(
            f"headwise was compiled against torch {compiled}, but torch {running} is installed: "
            f"install torch {wanted}.*, or build headwise again in this environment."
        )


def load_core() -> ModuleType:
    """Import and return ``headwise._C``, which registers ``torch.ops.headwise.*``.

    Raises:
        ImportError: if headwise was not built, or was built against another torch.
    """
    try:
        build_info = importlib.import_module("headwise._build_info")
    except ModuleNotFoundError:
        raise ImportError(
            "headwise has not been compiled: run `make build` in its source tree, or install it "
            "with `pip install ./python`."
        ) from None
    check_torch(build_info.torch_version, torch.__version__)
    core = importlib.import_module("headwise._C")
    # Not at the top: the package needs the core.
    importlib.import_module("headwise.io.core_errors").report_in_one_sentence(core)
    return core


core = load_core()
