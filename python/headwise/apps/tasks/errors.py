"""The one exception that a person's own input raises."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be done; the text is one sentence that says what and why.

    The command line prints it and exits with status 2.
    """
