"""The command line: ``headwise bench | compare | explain | score | prune``.

Exit status: 0, 1 (failed) or 2 (bad use); a failure is one sentence on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from headwise.apps.cli import bench, compare, explain, prune, score
from headwise.io.printable import printable


class _Parser(argparse.ArgumentParser):
    """Quotes arguments in its errors so that a terminal can show them."""

    def error(self, message: str):
        super().error(printable(message, 490))


COMMANDS = (bench, compare, explain, score, prune)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    import headwise

    parser = _Parser(
        prog="headwise",
        description="Every input chooses how many attention heads run, and which.",
    )
    parser.add_argument("--version", action="version", version=headwise._C.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = command.add_parser(commands)
        own.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        own.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    from headwise.apps.tasks.errors import UsageError

    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed the error and the usage
        return stop.code if isinstance(stop.code, int) else 2
    try:
        options.run(options)
        return 0
    except UsageError as error:
        return _fail(options, str(error), 2)
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 1)
    except BrokenPipeError:  # the reader closed the pipe
        sys.stderr.close()
        return 1
    except OSError as error:
        # Not a file name from the user (those are checked before), but for example a full disk.
        about = f"{error.filename}: " if error.filename else ""
        return _fail(options, f"{about}{error.strerror or error}", 1)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        return _fail(options, f"{type(error).__name__}: {lines[0]}", 1)


def _fail(options: argparse.Namespace, sentence: str, status: int) -> int:
    if options.debug:
        import traceback

        traceback.print_exc()
    print(f"headwise {options.command}: {printable(sentence, 490)}", file=sys.stderr)
    return status
