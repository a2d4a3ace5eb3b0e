"""The versions of transformers that the conversions are tested with.

``python/pyproject.toml`` allows every version 5 from :data:`OLDEST` on; a newer one than
:data:`NEWEST` converts with a warning, since transformers renames arguments of its attention
modules between minor versions.
What differs among the tested ones is in ``older_versions.py``, ``older_vit.py``, ``older_t5.py``.
"""

from __future__ import annotations

import functools
import sys
import warnings

from torch import nn

#: The minor versions at the two ends of what is tested: the lower bound in
#: ``python/pyproject.toml``, and the version in ``requirements/run.txt``.
OLDEST = "5.0"
NEWEST = "5.24"


def _minor(version: str) -> tuple[int, int]:
    """``"5.24.0.dev0"`` gives ``(5, 24)``."""
    major, minor = (version.split(".") + ["0"])[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)


@functools.cache
def check_version(installed: str) -> None:
    """Warns, once in a process, if this version of transformers is newer than those tested.

    Raises:
        RuntimeError: it is older than any that can be converted.
    """
    if _minor(installed) < _minor(OLDEST):
        raise RuntimeError(
            f"headwise converts models of transformers {OLDEST} or newer, got transformers "
            f"{installed}"
        )
    if _minor(installed) > _minor(NEWEST):
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST}, the newest that headwise was tested "
            "with: compare the converted model with the original on your own inputs",
            stacklevel=4,
        )


def check_transformers(model: nn.Module) -> None:
    """:func:`check_version` of the transformers that ``model`` has modules of, if it has any.

    Raises:
        RuntimeError: that version is older than any that can be converted.
    """
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        check_version(sys.modules["transformers"].__version__)
