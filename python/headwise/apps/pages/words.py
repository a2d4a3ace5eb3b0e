"""The documents in plain words."""

from __future__ import annotations

from typing import Any

from headwise.apps.pages.documents import Documents

#: Heading of the part about a data set.
OVER_DATA = "Over the data set"
#: Share of unknown tokens from which it is reported: every data set has a few.
TELL_UNKNOWN = 0.1


def parts(documents: Documents) -> list[tuple[str, list[str]]]:
    """(heading, sentences): the top of the page about a data set and, folded, about a
    comparison."""
    over: list[str] = []
    if documents.use is not None:
        over += use_sentences(documents.use)
    if documents.roles is not None:
        over.append(role_sentence(documents.roles))
    if documents.use is not None:
        over += trust_sentences(documents.use)
    result = documents.compared or {}
    compared = result.get("findings", [])
    rooms = result.get("headroom", [])
    before = [f"{room['task']}: {sentence}" for room in rooms for sentence in room["sentences"]]
    found = [
        (OVER_DATA, over),
        ("Before training: what choosing by the input could win", before),
        ("All that was found", list(compared)),
    ]
    return [(heading, own) for heading, own in found if own]


def sentences(documents: Documents) -> list[str]:
    """All of them."""
    return [sentence for _, own in parts(documents) for sentence in own]


def use_sentences(document: dict[str, Any]) -> list[str]:
    """How many heads run, and for which texts."""
    use, data = document["use"], document["data"]
    share = use["heads_mean"] / use["heads"] if use["heads"] else 0.0
    spread = (
        "the same number for every text"
        if use["heads_min"] == use["heads_max"]
        else f"from {use['heads_min']} to {use['heads_max']}"
    )
    right = "" if data["accuracy"] is None else f"; {data['accuracy']:.1%} are classified rightly"
    found = [
        f"Over {data['texts']:,} texts {use['heads_mean']:.1f} of {use['heads']} heads ran on "
        f"average ({share:.0%}), {spread}{right}.",
        f"{count(use['always'], 'head')} ran for every text, {use['never']} for none; which of the "
        f"other {use['heads'] - use['always'] - use['never']} ran depends on the text.",
    ]
    if (data.get("tokens_unknown") or 0.0) >= TELL_UNKNOWN:
        found.append(
            f"{data['tokens_unknown']:.0%} of the tokens are unknown to the tokenizer: is this the "
            "language of the model?"
        )
    heads = [
        (layer["site"], head)
        for layer in use["layers"]
        for head in layer["heads"]
        if head["information"] is not None and head["information"]["q"] is not None
    ]
    told = [pair for pair in heads if pair[1]["information"]["q"] < 0.05]
    if heads:
        line = f"{count(len(told), 'head')} of {len(heads)} tested run more for some classes"
        if told:
            site, head = max(told, key=lambda pair: pair[1]["information"]["bits"])
            line += (
                f" than for others, most of all layer {site} head {head['head']} "
                f"({head['information']['bits']:.3f} bits about the class)"
            )
        found.append(f"{line} (false discovery rate 5%).")
    return found


def role_sentence(document: dict[str, Any]) -> str:
    """How many heads have a role, and which."""
    kinds: dict[str, int] = {}
    heads = having = 0
    for layer in document["layers"]:
        for head in layer["heads"]:
            heads += 1
            told = [role for role in head["roles"] if _beats_baseline(role)]
            having += bool(told)
            for kind in {role["role"] for role in told}:
                kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return f"None of {heads} heads has a role at these thresholds."
    listed = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items(), key=lambda i: -i[1]))
    return f"{having} of {heads} heads {'has' if having == 1 else 'have'} a role: {listed}."


def _beats_baseline(role: dict[str, Any]) -> bool:
    """Whether the whole interval of a role's share is above its baseline; broad and narrow heads,
    which have none, count."""
    low = role["share"] if role["low"] is None else role["low"]
    return role["baseline"] is None or low > role["baseline"]


def trust_sentences(document: dict[str, Any]) -> list[str]:
    """How stable selections are, and whether the stated order is faithful."""
    found = []
    noise = [row for row in document["stability"] if row["kind"] == "noise"]
    if noise:
        worst = min(noise, key=lambda row: row["jaccard"])
        found.append(
            f"When texts change a little ({worst['name']}), {worst['jaccard']:.0%} of the heads "
            f"that run before or after run both times; of two different texts "
            f"{worst['jaccard_other_inputs']:.0%}."
        )
    joint = document.get("joint_ablation")
    if joint is not None:
        listed = "; ".join(
            f"layer {group['site']} heads {', '.join(map(str, group['heads']))}"
            for group in joint["groups"][:3]
        )
        more = "" if len(joint["groups"]) <= 3 else f" and {len(joint['groups']) - 3} more"
        found.append(
            f"Of {count(len(joint['pairs']), 'pair')} of heads taken out together, "
            + (
                f"these can replace each other: {listed}{more}."
                if listed
                else "none can replace each other."
            )
        )
    faith = document["faithfulness"]
    if faith is not None and faith["low"] is not None and faith["high"] is not None:
        if faith["low"] > 0:
            verdict = "so the gates' order of heads says something of what matters"
        elif faith["high"] < 0:
            verdict = "so the gates' order of heads is worse than chance"
        else:
            verdict = "so the gates' order of heads cannot be told from chance"
        found.append(
            f"Removing heads in the stated order keeps {faith['area']:+.3f} "
            f"({faith['low']:+.3f} to {faith['high']:+.3f}) of log-probability more than at "
            f"random, {verdict}."
        )
    return found


def count(number: int, noun: str) -> str:
    """``1 head``, ``2 heads``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
