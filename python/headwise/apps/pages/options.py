"""The page's options of ``headwise explain``: ``--format``, ``--compared``, and the files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headwise.apps.tasks.errors import UsageError

#: The packages of each format besides torch.
_NEEDS = {"html": ("plotly", "jinja2"), "png": ("matplotlib",), "json": ()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--format`` and ``--compared``."""
    group = parser.add_argument_group("page")
    group.add_argument(
        "--format",
        nargs="+",
        choices=tuple(_NEEDS),
        default=[],
        help="write explanation.html or use.html (one file that needs no network), or the figures "
        "as PNG, to --out, which gets the JSON in any case; with --text all attention maps are "
        "kept unless --maps says which",
    )
    group.add_argument(
        "--compared",
        type=Path,
        metavar="FILE",
        help="results.json of 'headwise compare', shown on the page too",
    )


def check(options: argparse.Namespace) -> None:
    """Checks the options before any work is done; decides which attention maps are kept.

    Raises:
        UsageError: no folder to write to, a missing package, or a file of the wrong kind.
    """
    if options.maps is None:
        options.maps = ["all" if {"html", "png"} & set(options.format) else "none"]
    if options.compared is not None and not {"html", "png"} & set(options.format):
        raise UsageError("--compared needs --format html or png: it is shown on the page")
    if not options.format:
        return
    if options.out is None:
        raise UsageError("--format needs --out DIR, the folder that the files are written to")
    from headwise.apps.cli.common import need_packages, writable_folder
    from headwise.apps.pages.documents import sort_documents

    for name in options.format:
        need_packages(f"--format {name}", _NEEDS[name], "explain")
    if options.compared is not None:
        try:
            compared = sort_documents((options.compared,)).compared
        except FileNotFoundError:
            raise UsageError(f"there is no file {options.compared}") from None
        except (OSError, ValueError, TypeError):
            compared = None
        if compared is None:
            raise UsageError(f"{options.compared} is not results.json of 'headwise compare'")
    writable_folder(options.out)


def write(options: argparse.Namespace, *documents: Any) -> None:
    """Writes the files of ``--format`` to ``--out``, and prints their names."""
    if not options.format:
        return
    from headwise.apps.cli.common import say
    from headwise.apps.pages import write_page, write_pngs

    shown = [*documents, *([options.compared] if options.compared is not None else [])]
    if "html" in options.format:
        one_by_one = options.data is None or options.row is not None
        path = options.out / ("explanation.html" if one_by_one else "use.html")
        write_page(path, *shown)
        say(f"wrote {path}")
    if "png" in options.format:
        files = write_pngs(options.out, *shown)
        say(f"wrote {', '.join(file.name for file in files)} to {options.out}")
