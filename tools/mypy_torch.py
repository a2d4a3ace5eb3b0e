"""A plugin of mypy: the attributes of a ``torch.nn.Module`` that no class declares are Any.

torch declares them as ``Tensor | Module``, which is wrong for numbers, configurations and methods,
and asks for a check wherever a submodule's own attribute is read.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module."


def undeclared(context: AttributeContext) -> Type:
    kind = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.explicit) if isinstance(kind, UnionType) else kind


class TorchPlugin(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return undeclared if fullname.startswith(MODULE) else None


def plugin(version: str) -> type[Plugin]:
    return TorchPlugin
