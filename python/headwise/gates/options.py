"""The tables of gates' options, defined in the C++ core: arguments, checks and documentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from headwise import _C
from headwise.io.printable import quoted

#: A gate's arguments for the sizes of its layer.
BINDING = {
    "embed_dim": "width of the layer's input, D.",
    "num_heads": "heads of the layer, H.",
    "device": "of the parameters.",
    "dtype": "of the parameters.",
}
TABLES: dict[str, list[_C.OptionRow]] = dict(_C.gate_tables())
#: Options of a gate that say the same thing in two ways: at most one may be given. The core
#: compares their values; only a constructor knows that a default was given on purpose.
ALTERNATIVES = {
    "BudgetGate": ("keep", "budget"),
    "FixedGate": ("heads", "scale"),
    "SubsetGate": ("k", "keep"),
}


def checked(gate: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a gate, with defaults for those that are not given.

    Raises:
        TypeError: a value is not of the option's kind.
        ValueError: a value is out of its range, or an option is not one of the gate's.
    """
    return _C.gate_options(gate, dict(options))


def without_defaults(gate: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration, which has them all, without :data:`ALTERNATIVES` that have
    their default: those were not given."""
    defaults = {row.name: row.default for row in TABLES.get(gate, ())}
    unset = [name for name in ALTERNATIVES.get(gate, ()) if options.get(name) == defaults[name]]
    return {name: value for name, value in options.items() if name not in unset}


def constructor(gate: str, init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a gate whose only arguments are its options and its layer's sizes."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for row in TABLES[gate]:
        where = kind if len(parameters) > 1 else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(
            inspect.Parameter(row.name, where, default=row.default, annotation=row.type)
        )
    parameters += [inspect.Parameter(name, kind, default=None) for name in BINDING]
    signature = inspect.Signature(parameters)

    def __init__(self, *arguments, **named) -> None:
        try:
            given = dict(signature.bind(self, *arguments, **named).arguments)
        except TypeError as error:
            known = ", ".join(row.name for row in TABLES[gate])
            raise TypeError(f"{gate}: {error}; it has {known}") from None
        del given["self"]
        binding = {name: given.pop(name) for name in BINDING if name in given}
        first, second = ALTERNATIVES.get(gate, ("", ""))
        if given.get(first) is not None and given.get(second) is not None:
            raise ValueError(
                f"{first} and {second} must not both be given, got {first}="
                f"{quoted(given[first])} and {second}={quoted(given[second])}"
            )
        init(self, checked(gate, given), **binding)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


def documented(gate: str, doc: str) -> str:
    """``doc`` with the line ``{options}`` replaced by the gate's arguments."""
    lines = []
    for row in TABLES[gate]:
        rule = f" ({row.rule})" if row.rule and not row.rule.startswith("one of") else ""
        lines.append(f"    {row.name}: {row.doc}{rule}.")
    lines += [f"    {name}: {what}" for name, what in BINDING.items()]
    return inspect.cleandoc(doc).replace("{options}", "Args:\n" + "\n".join(lines))
