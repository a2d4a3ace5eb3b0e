"""Wrong arguments of the C++ core, reported in one sentence instead of pybind11's several lines."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from headwise.io.printable import printable, quoted

#: A signature as pybind11 lists it: ``    1. (self: headwise._C.HeadPlan, path: str) -> None``.
_SIGNATURE = re.compile(r"    \d+\. [\w.]*\((?:self: [\w.]+(?:, )?)?(.*)\)(?: -> .*)?")
#: What pybind11 accepts for numbers, and packages of names.
_SHORTER = {
    r"typing\.SupportsInt \| typing\.SupportsIndex": "int",
    r"typing\.SupportsFloat \| typing\.SupportsIndex": "float",
    r"headwise\._C\.|collections\.abc\.|typing\.": "",
}


def _sentence(name: str, takes: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    given = [quoted(value, 40) for value in args]
    given += [f"{key}={quoted(value, 40)}" for key, value in kwargs.items()]
    known = printable(" or ".join(f"({text})" for text in takes), 260)
    return f"{name}() takes {known}, got ({printable(', '.join(given), 120)})"


def _reported(function: Callable[..., Any], name: str, first: int = 0) -> Callable[..., Any]:
    """``function`` with this error; ``first``: number of the first argument that it names."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            lines = str(error).splitlines()
            if "incompatible" not in lines[0]:
                raise
        takes = [match[1] for line in lines if (match := _SIGNATURE.fullmatch(line))]
        for long, short in _SHORTER.items():
            takes = [re.sub(long, short, text) for text in takes]
        raise TypeError(_sentence(name, takes, args[first:], kwargs))

    return call


def report_in_one_sentence(core: ModuleType) -> None:
    """Wraps the functions, constructors and methods of ``core``."""
    for name, value in list(vars(core).items()):
        if inspect.isbuiltin(value):
            setattr(core, name, _reported(value, name))
        elif inspect.isclass(value):
            for member, method in list(vars(value).items()):
                function = getattr(method, "__func__", method)
                if not inspect.isbuiltin(function):
                    continue
                if isinstance(method, staticmethod):
                    setattr(value, member, staticmethod(_reported(function, f"{name}.{member}")))
                elif member == "__init__":  # whose self has no value yet
                    setattr(value, member, _reported(function, name, 1))
                elif not member.startswith("_"):
                    setattr(value, member, _reported(function, f"{name}.{member}", 1))
