"""A hook of MkDocs (mkdocs.yml) that adds pages from elsewhere to docs/:

- README.md as the first page, CONTRIBUTING.md and CHANGELOG.md
- the reference of Python: the ``__all__`` of each public package, for mkdocstrings
- the reference of C++: a page per header of include/headwise, of its Doxygen comments

Links between them are converted, and links to files that are not pages become plain names.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "headwise"
HEADERS = ROOT / "include" / "headwise"
#: Page of the site -> file of the tree.
MOVED = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


# --- links ---


def turned(markdown: str, page: str, pages: set[str]) -> str:
    """``markdown`` of the site's ``page``, its links as the site has them."""
    folder = posixpath.dirname(MOVED.get(page, f"docs/{page}"))
    sources = {source: target for target, source in MOVED.items()}

    def turn(link: re.Match) -> str:
        picture, text, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        own = sources.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if own is None or (not picture and own not in pages):
            return text
        relative = posixpath.relpath(own, posixpath.dirname(page) or ".")
        return f"{picture}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(turn, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(turn, markdown[end:])])


# --- Python ---


def exported(package: str) -> dict[str, str]:
    """Name -> where it is found, for the ``__all__`` of a package; packages in it are left out."""
    source = ROOT.joinpath("python", *package.split("."), "__init__.py").read_text(encoding="utf-8")
    names, packages = [], set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom) and node.module == package:
            packages |= {alias.name for alias in node.names}
    found = {}
    for name in names:
        if name not in packages:
            # headwise.convert is a function, and in the tree a package: the function is in that.
            inside = (PACKAGE / name).is_dir() and package == "headwise"
            found[name] = f"{package}.{name}.{name}" if inside else f"{package}.{name}"
    return found


def python_pages() -> dict[str, str]:
    """A page per public package; a name that ``headwise`` has is on its page alone."""
    packages = ["headwise"] + sorted(
        f"headwise.{path.parent.name}" for path in PACKAGE.glob("[a-z]*/__init__.py")
    )
    pages, seen, index = {}, set(), ["# Python reference", ""]
    for package in packages:
        names = {name: path for name, path in exported(package).items() if name not in seen}
        seen.update(names)
        if names:
            items = "\n".join(f"::: {path}\n" for path in names.values())
            pages[f"reference/python/{package}.md"] = f"# `{package}`\n\n{items}"
            index.append(f"- [`{package}`](python/{package}.md): {', '.join(names)}")
    return {"reference/python.md": "\n".join(index), **pages}


class Roles(griffe.Extension):
    """Turns :func:`headwise.plan` of docstrings into a link, and other roles into plain names; and
    ``Example`` into the section that griffe knows."""

    def __init__(self) -> None:
        self.known = {f"headwise.{name}": path for name, path in exported("headwise").items()}
        for path in PACKAGE.glob("[a-z]*/__init__.py"):
            package = f"headwise.{path.parent.name}"
            for name, place in exported(package).items():
                own = name in {known.rpartition(".")[2] for known in self.known.values()}
                if not own:
                    self.known[f"{package}.{name}"] = place

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            role = r":(?:attr|class|data|func|math|meth|mod):`~?([^`]+)`"
            text = re.sub(role, self.linked, obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)  # its code is code

    def linked(self, role: re.Match) -> str:
        name = role[1]
        return f"[`{name}`][{self.known[name]}]" if name in self.known else f"`{name}`"


# --- C++ ---


def plain(text: str | None) -> str:
    """Text that Markdown shows unchanged."""
    return re.sub(r"([\\\[\]*_`])", r"\\\1", html.escape(text or "", quote=False))


def prose(node: ElementTree.Element | None) -> str:
    """Doxygen's XML of a comment as Markdown."""
    if node is None:
        return ""
    text = plain(node.text)
    for child in node:
        inner = prose(child)
        own = "".join(child.itertext())
        if child.tag == "computeroutput":
            inner = f"`{own}`"
        elif child.tag == "emphasis":
            inner = f"*{inner}*"
        elif child.tag == "bold":
            inner = f"**{inner}**"
        elif child.tag == "listitem":
            inner = f"\n- {inner.strip()}"
        elif child.tag in ("verbatim", "programlisting"):
            inner = f"\n\n```cpp\n{own}\n```\n\n"
        elif child.tag == "parameterlist":
            inner = "\n\n" + "\n".join(parameters(child)) + "\n\n"
        elif child.tag == "simplesect":
            inner = f"\n\n**{child.get('kind', '').capitalize()}:** {inner.strip()}\n\n"
        elif child.tag == "para":
            inner = f"{inner}\n\n"
        text += inner + plain(child.tail)
    return text


def parameters(node: ElementTree.Element) -> list[str]:
    throws = node.get("kind") == "exception"
    lines = ["**Throws:**" if throws else "**Parameters:**", ""]
    for item in node.findall("parameteritem"):
        names = ", ".join(f"`{''.join(name.itertext())}`" for name in item.iter("parametername"))
        lines.append(f"- {names}: {' '.join(prose(item.find('parameterdescription')).split())}")
    return lines


def described(node: ElementTree.Element) -> str:
    text = prose(node.find("briefdescription")) + prose(node.find("detaileddescription"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def declaration(member: ElementTree.Element) -> str:
    if member.get("kind") == "enum":
        values = ", ".join(value.findtext("name") for value in member.findall("enumvalue"))
        return f"enum class {member.findtext('name')} {{ {values} }};"
    definition = " ".join("".join(member.find("definition").itertext()).split())
    parts = [re.sub(r"headwise::(\w+::)*(?=~?\w+$)", "", definition)]
    for name, before in (("argsstring", ""), ("initializer", " ")):
        part = member.find(name)
        if part is not None and (text := "".join(part.itertext())):
            parts.append(before + text)
    text = "".join(parts)
    for spaced, tight in ((" *", "* "), (" &", "& "), ("< ", "<"), (" >", ">")):
        text = text.replace(spaced, tight)
    return f"{text};"


def header_page(file: ElementTree.Element, free: list[ElementTree.Element], folder: Path) -> str:
    """The page of one header: its classes with their documented members, and what is ``free`` in
    it, such as functions."""
    name = file.findtext("compoundname")
    lines = [f"# `headwise/{name}`", ""]
    source = (HEADERS / name).read_text(encoding="utf-8")
    opening = re.match(r"(//[^\n]*\n)+", source)
    if opening:
        lines += [plain(" ".join(opening[0].replace("//", "").split())), ""]
    for inner in file.findall("innerclass"):
        kind = ElementTree.parse(folder / f"{inner.get('refid')}.xml").getroot().find("compounddef")
        lines += [f"## `{inner.text.removeprefix('headwise::')}`", "", described(kind), ""]
        for member in kind.iter("memberdef"):
            if member.get("prot") == "public" and (text := described(member)):
                lines += [f"```cpp\n{declaration(member)}\n```", "", text, ""]
    for member in free:
        if text := described(member):
            lines += [f"## `{member.findtext('name')}`", ""]
            lines += [f"```cpp\n{declaration(member)}\n```", "", text, ""]
    return "\n".join(lines)


def cpp_pages() -> dict[str, str]:
    if shutil.which("doxygen") is None:
        raise SystemExit("make docs needs doxygen: apt-get install doxygen")
    options = {
        "INPUT": HEADERS,
        "GENERATE_HTML": "NO",
        "GENERATE_LATEX": "NO",
        "GENERATE_XML": "YES",
        "XML_PROGRAMLISTING": "NO",
        "QUIET": "YES",
        "WARN_IF_UNDOCUMENTED": "NO",
        "WARN_IF_INCOMPLETE_DOC": "NO",
        "MACRO_EXPANSION": "YES",
        "EXPAND_ONLY_PREDEF": "YES",
        "PREDEFINED": 'HEADWISE_API= "TORCH_ARG(T,n)=T n" "TORCH_MODULE(n)="',
    }
    pages, index = (
        {},
        ["# C++ reference", "", "`#include <headwise/headwise.h>` brings all of it.", ""],
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = "".join(f"{key} = {value}\n" for key, value in options.items())
        subprocess.run(["doxygen", "-"], cwd=folder, input=settings, text=True, check=True)
        space = ElementTree.parse(Path(folder, "xml", "namespaceheadwise.xml")).getroot()
        free: dict[str, list[ElementTree.Element]] = {}
        for member in space.iter("memberdef"):
            free.setdefault(Path(member.find("location").get("file")).name, []).append(member)
        for path in sorted(Path(folder, "xml").glob("*_8h.xml")):
            file = ElementTree.parse(path).getroot().find("compounddef")
            name = file.findtext("compoundname")
            page = header_page(file, free.get(name, []), path.parent)
            if "\n## " in page:
                pages[f"reference/cpp/{name}.md"] = page
                names = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
                index.append(f"- [`{name}`](cpp/{name}.md): {', '.join(dict.fromkeys(names))}")
    return {"reference/cpp.md": "\n".join(index), **pages}


# --- MkDocs calls these ---


def on_files(files, config):
    from mkdocs.structure.files import File, InclusionLevel

    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in MOVED.items()}
    pages |= python_pages() | cpp_pages()
    for name, text in pages.items():
        file = File.generated(config, name, content=text)
        if name.startswith(("reference/python/", "reference/cpp/")):
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri.startswith("reference/"):
        return markdown
    return turned(markdown, page.file.src_uri, {file.src_uri for file in files})
