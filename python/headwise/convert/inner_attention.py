"""Attention that transformers splits into two modules: an inner one with query, key and value, and
``output`` with the projection ``dense``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from headwise.convert.checks import CALLED, HOOKS, hooks_fault
from headwise.convert.transformers_attention import EncoderReplacement, SeparateProjections


class InnerAttention(SeparateProjections):
    """The inner module becomes one :class:`headwise.MultiheadAttention`, which projects its output
    itself; the rest of ``output`` stays."""

    #: The name of the inner module.
    inner: str

    def is_converted(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, self.inner, None), EncoderReplacement)

    def _faults(self, module: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[str | None]:
        yield from super()._faults(module, linears)
        after = tuple(kind for kind in CALLED if kind != "_forward_pre_hooks")
        yield hooks_fault(
            self.inner, self.attention(module), after, "would get the projected output"
        )
        yield hooks_fault("output", module.output, CALLED, "would get what is projected already")
        yield hooks_fault("output", module.output, HOOKS, "would see other names")

    def projections(self, module: nn.Module) -> dict[str, nn.Linear]:
        own = self.attention(module)
        inputs = {f"{self.inner}.{name}": getattr(own, name) for name in ("query", "key", "value")}
        return {**inputs, "output.dense": module.output.dense}

    def attention(self, module: nn.Module) -> nn.Module:
        return getattr(module, self.inner)

    def put(self, module: nn.Module, replacement: nn.Module) -> nn.Module:
        setattr(module, self.inner, replacement)
        module.output.dense = nn.Identity()
        return module
