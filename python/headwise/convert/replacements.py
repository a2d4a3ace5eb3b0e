"""The classes of replacements of transformers modules.

Each also derives from the class that it replaces, so that transformers finds it when it collects
attention weights (``output_attentions=True``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from torch import nn

from headwise.convert.registry import family, prefix_in


def named(path: str) -> type:
    """The class ``package.module.Class``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def replacement_classes(
    file: str, base: type[nn.Module], suffix: str = "Attention", classes_of: str | None = None
) -> tuple[Callable[[type], type], Callable[[str], type]]:
    """The replacement classes of one file of this folder, created on demand.

    Args:
        file: the file's module, where pickles find them by name.
        base: their other base class, under a name that none of them has: pickles find them by it.
        suffix: the end of the originals' names, after the prefix of their model.
        classes_of: the file with the family of models; default ``file``.

    Returns:
        ``selected(class of the original) -> class``, also for its subclasses, and the
        ``__getattr__`` of the file's module, which
        knows the classes as ``SelectedPREFIXAttention``.
    """
    models = family(classes_of or file)

    @functools.cache
    def made(prefix: str) -> type:
        original = named(f"{models[prefix]}.{prefix}{suffix}")
        return type(f"Selected{prefix}{suffix}", (base, original), {"__module__": file})

    def selected(original: type) -> type:
        return made(prefix_in(models, original, suffix))

    def by_name(name: str) -> type:
        prefix = name.removeprefix("Selected").removesuffix(suffix)
        if name == f"Selected{prefix}{suffix}" and prefix in models:
            return made(prefix)
        raise AttributeError(f"module {file!r} has no attribute {name!r}")

    return selected, by_name
