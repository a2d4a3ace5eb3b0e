"""The exception for invalid user input."""

from __future__ import annotations

from headwise.io.printable import printable

#: Maximum length of an error message.
LONGEST = 490


class UsageError(ValueError):
    """A request cannot be fulfilled; the text is one sentence that says what and why.

    The sentence may quote file names, labels and cells as they are: control characters in it are
    escaped, and long text is truncated. The command line prints it and exits with status 2.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence, LONGEST))
