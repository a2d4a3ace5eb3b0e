"""One self-contained HTML file: the page of explanations, uses and comparisons."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from headwise.apps.compare.verdict import verdicts
from headwise.apps.pages.documents import Documents, complete_documents, sort_documents
from headwise.apps.pages.pack import pack, script_json
from headwise.apps.pages.words import OVER_DATA, parts
from headwise.io.files import write_atomic

#: Maximum bytes of a page: it is sent by mail and opened from disk.
LIMIT = 6_000_000

_SCRIPTS = ("base.js", "contrast.js", "explained.js", "data_set.js", "compared.js")


def page(*documents: Any) -> str:
    """The page, as HTML.

    It loads nothing from elsewhere, and its content security policy allows only its own scripts:
    texts cannot become code.

    Args:
        documents: each at most once: the results of :func:`headwise.explain`,
            :func:`headwise.explain_data` and :func:`headwise.head_roles`, the ``results.json`` of
            ``headwise compare``, or the paths of such files.

    Raises:
        ImportError: plotly or jinja2 is not installed.
        TypeError, ValueError: no documents, two of a kind, or something else (by name).
        OSError: a file cannot be read.
    """
    with complete_documents():
        return _render(sort_documents(documents))


def write_page(path: str | os.PathLike, *documents: Any) -> None:
    """Writes the page to ``path`` atomically: one file of less than 6 MB that needs no network. See
    docs/interpretability.md for its content.

    Args:
        path: an ``.html`` file.
        documents: as for :func:`page`.

    Raises:
        ImportError: plotly or jinja2 is not installed.
        TypeError, ValueError: no documents, two of a kind, or something else (by name).
        OSError: it cannot be written.
    """
    write_atomic(path, page(*documents))


def write_pngs(folder: str | os.PathLike, *documents: Any) -> list[Path]:
    """Writes the figures of the page as PNG files to ``folder``; returns their paths.

    Args:
        folder: created if it does not exist.
        documents: as for :func:`page`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: no documents, two of a kind, or something else (by name).
        OSError: they cannot be written.
    """
    from headwise.apps.pages.figures import write_figures

    with complete_documents():
        return write_figures(Path(folder), sort_documents(documents))


def _render(documents: Documents) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    folder = files("headwise.apps.pages")
    own = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    scripts = [get_plotlyjs(), *own]
    css = (folder / "page.css").read_text(encoding="utf-8")
    template = Environment(
        loader=PackageLoader("headwise.apps.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    ).get_template("page.html.j2")
    # Everything except data: the notes are a few hundred bytes.
    room = LIMIT - sum(len(script.encode()) for script in scripts) - len(css.encode()) - 40_000
    title, subtitle, sections = _headings(documents)
    everything = parts(documents)
    room -= sum(
        len(sentence.encode("utf-8", "replace")) for _, own in everything for sentence in own
    )
    told = [part for part in everything if part[0] == OVER_DATA]
    shown, notes = pack(documents, room)
    content = template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        summary=shown["inputs"][0]["summary"] if shown["inputs"] else None,
        told=told,
        folded=[part for part in everything if part not in told],
        verdicts=[] if documents.compared is None else verdicts(documents.compared),
        notes=notes,
        hashes=[_hash(script) for script in scripts],
        # The package's own files, and JSON without characters that are special in HTML.
        css=Markup(css),
        scripts=[Markup(script) for script in scripts],
        data=Markup(script_json(shown)),
    )
    # Half of a surrogate pair, which a JSON file may have, cannot be written.
    return content.encode("utf-8", "replace").decode("utf-8")


def _headings(documents: Documents) -> tuple[str, str, list[tuple[str, str]]]:
    """Title, line beneath it, and (id, heading) of each section."""
    sections = []
    if documents.explanation is not None:
        sections.append(("explained", "One input"))
    if documents.roles is not None:
        sections.append(("use", "Over a data set"))
    if documents.compared is not None:
        sections.append(("compared", "Static against dynamic"))
    about = []
    model = (documents.explanation or documents.use or {}).get("model")
    if model is not None:
        about.append(f"{model['class']}: {model['heads']} heads at {model['sites']} layers")
    elif documents.compared is not None:
        model = documents.compared["model"]
        about.append(f"{model['name']}: {model['heads']} heads in {model['layers']} layers")
    if documents.explanation is not None:
        inputs = len(documents.explanation["inputs"])
        about.append("1 input" if inputs == 1 else f"{inputs} inputs")
    if documents.use is not None:
        about.append(f"a data set of {documents.use['data']['texts']:,} texts")
    title = "Static against dynamic heads" if sections[0][0] == "compared" else "Why these heads"
    return title, "; ".join(about) + ("." if about else ""), sections


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
