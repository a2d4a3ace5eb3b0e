"""The shape of a batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One way to call a model: inputs per batch, tokens of each (None: as they come)."""

    batch: int
    length: int | None = None

    def within(self, most: int | None) -> Shape:
        """The same for a model with this maximum number of tokens."""
        if self.length is None or most is None:
            return self
        return Shape(self.batch, min(self.length, most))

    def __str__(self) -> str:
        length = "real lengths" if self.length is None else f"{self.length} tokens"
        return f"batch {self.batch}, {length}"
