"""Where the files of installed packages are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from headwise.apps.tasks.errors import UsageError


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it: only its files are needed,
    not its dependencies.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UsageError(
            f"the Python package {name} is not installed; "
            f"install it with: {sys.executable} -m pip install --no-deps {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
