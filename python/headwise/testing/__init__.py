"""Checks for your own gates and architectures: what the library's tests assert of each of its own.

They raise AssertionError with one sentence that names the failed check, so they work with or
without a test runner.
"""

from headwise.testing.architecture import check_architecture
from headwise.testing.gate import check_gate, check_selection

__all__ = ["check_architecture", "check_gate", "check_selection"]
