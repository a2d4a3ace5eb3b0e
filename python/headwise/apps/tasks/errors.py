"""The one exception that a person's own input raises."""

from __future__ import annotations

from headwise.io.printable import printable

#: Letters of an error message.
LONGEST = 490


class UsageError(ValueError):
    """What was asked for cannot be done; the text is one sentence that says what and why.

    The sentence may quote file names, labels and cells as they are: control characters in it are
    escaped, and what is too long is cut. The command line prints it and exits with status 2.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence, LONGEST))
