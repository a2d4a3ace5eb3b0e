"""Checks for gates and architectures of your own: what the library's own tests assert of each.

They raise AssertionError with one sentence that says what does not hold, so they work in any test
runner, and need none.
"""

from headwise.testing.architecture import check_architecture
from headwise.testing.gate import check_gate, check_selection

__all__ = ["check_architecture", "check_gate", "check_selection"]
