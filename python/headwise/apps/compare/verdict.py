"""The verdict of a study: one sentence in everyday words, three numbers, and the Pareto front of
accuracy and measured time."""

from __future__ import annotations

from collections.abc import Sequence

#: Points of accuracy that count: less is called nothing, and a test that cannot exclude more is too
#: small.
MARGIN = 1.0
#: Of the way from guessing to no error: a dense model that has come less far says nothing.
LEARNED = 0.25


def verdicts(result: dict) -> list[dict]:
    """One for each task, from ``summary`` and ``comparisons``.

    Each has the ``sentence``, the ``task`` and its ``title``, and the ``tiles``: {label, value,
    note} of accuracy, time and heads of the model that the sentence recommends, against dense.

    Choosing by the input is worth something at the budgets at which the whole 95% interval of the
    best dynamic method over the best static one is above 0, and nothing if at every budget the
    interval ends below one point. The recommendation is the smallest model that loses nothing: the
    interval of its difference to dense reaches above 0 and not one point below it. Both methods
    were chosen on validation inputs. A dense model that is hardly better than guessing is reported
    instead.
    """
    found = []
    for task in result["tasks"]:
        entries = [e for e in result["summary"] if e["task"] == task["name"]]
        dense = next((e for e in entries if e["method"] == "dense"), None)
        own = [c for c in result["comparisons"] if c["task"] == task["name"]]
        if dense is None or not own:
            continue
        found.append(
            {"task": task["name"], "title": task["title"], **_verdict(own, entries, dense, task)}
        )
    return found


def recommended(result: dict, task: str) -> dict | None:
    """The entry of ``summary`` that the verdict on ``task`` recommends, or None."""
    own = [c for c in result["comparisons"] if c["task"] == task]
    entries = [e for e in result["summary"] if e["task"] == task]
    dense = next((e for e in entries if e["method"] == "dense"), None)
    about = next(t for t in result["tasks"] if t["name"] == task)
    if dense is None or not own or too_little(dense, about) is not None:
        return None
    kind, chosen = _choice(own)
    return _entry(entries, kind, chosen)


def front(entries: Sequence[dict], shape: int = 0) -> list[dict]:
    """The entries that no other beats in both mean accuracy and mean time, fastest first."""

    def order(e: dict) -> tuple[float, float]:
        return e["latency"][shape]["ratio"], -e["accuracy"]

    found: list[dict] = []
    for entry in sorted(entries, key=order):
        if not found or entry["accuracy"] > found[-1]["accuracy"]:
            found.append(entry)
    return found


def shape_text(shape: dict) -> str:
    """The name of a latency's shape."""
    length = "inputs as they come" if shape["length"] is None else f"{shape['length']} tokens"
    return f"batch {shape['batch']}, {length}"


def _winning(comparisons: list[dict]) -> list[dict]:
    both = [c for c in comparisons if "dynamic_minus_static" in c]
    return [c for c in both if c["dynamic_minus_static"]["low"] > 0]


def _choice(comparisons: list[dict]) -> tuple[str, dict]:
    """The kind that is recommended, and its comparison."""
    if winning := _winning(comparisons):
        return "dynamic", max(winning, key=lambda c: c["dynamic_minus_static"]["points"])
    kind = "static" if any("static" in c for c in comparisons) else "dynamic"
    return kind, _smallest(comparisons, kind)


def _entry(entries: list[dict], kind: str, chosen: dict) -> dict:
    return next(
        e
        for e in entries
        if (e["method"], e["keep_target"]) == (chosen[kind], chosen["keep_target"])
    )


def _verdict(comparisons: list[dict], entries: list[dict], dense: dict, task: dict) -> dict:
    winning = _winning(comparisons)
    kind, chosen = _choice(comparisons)
    if winning:
        best = chosen
        begin = (
            f"choosing by the input is worth {best['dynamic_minus_static']['points']:.1f} points "
            f"at {_share(best['keep_target'])} of the heads"
        )
    else:
        begin = _worth([c for c in comparisons if "dynamic_minus_static" in c])
    entry = _entry(entries, kind, chosen)
    difference = chosen[f"{kind}_minus_dense"]
    time = entry["latency"][0]
    saved = _saved(time)
    lost = _lost(difference, metric_title(entry))
    heads = f"{_share(entry['keep_target'])} of the heads"
    if kind == "dynamic":
        at = "" if winning else f" at {heads}"
        advice = f"{entry['title']}{at} {_third(saved)}; {lost}"
    else:
        advice = f"prune to {heads} ({entry['title']}) and {saved}; {lost}"
    sentence = f"On this data {begin}: {advice}." if begin else f"On this data, {advice}."
    if (guessing := too_little(dense, task)) is not None:
        sentence = (
            f"The dense model has learned too little to compare with ({dense['accuracy']:.0%}; "
            f"guessing gives {guessing:.0%}): train it longer (--dense-steps)."
        )
        tile = {"label": "accuracy", "value": f"{dense['accuracy']:.1%}", "note": "dense"}
        return {"sentence": sentence, "tiles": [tile]}
    return {"sentence": sentence, "tiles": _tiles(entry, dense, difference)}


def too_little(dense: dict, task: dict) -> float | None:
    """The accuracy of guessing, if the dense model is hardly better."""
    known = task.get("classes") and metric_title(dense) == "accuracy"
    guessing = 1 / len(task["classes"]) if known else 0.0
    learned = dense["accuracy"] - guessing
    return guessing if guessing and learned < LEARNED * (1 - guessing) else None


def _worth(both: list[dict]) -> str:
    """The value of choosing by the input if it wins at no budget for sure."""
    if not both:
        return ""
    most = max(both, key=lambda c: c["dynamic_minus_static"]["high"])["dynamic_minus_static"]
    if most["high"] < MARGIN:
        return "choosing by the input is worth nothing"
    return (
        f"this test is too small to tell whether choosing by the input is worth anything "
        f"({most['low']:+.1f} to {most['high']:+.1f} points)"
    )


def _smallest(comparisons: list[dict], kind: str) -> dict:
    """The smallest budget at which nothing is lost; else the one that loses least."""
    own = [c for c in comparisons if kind in c]
    whole = [c for c in own if _keeps(c[f"{kind}_minus_dense"])]
    if whole:
        return min(whole, key=lambda c: c["keep_target"])
    return max(own, key=lambda c: c[f"{kind}_minus_dense"]["points"])


def _keeps(difference: dict) -> bool:
    return difference["low"] > -MARGIN and difference["high"] >= 0


def _lost(difference: dict, metric: str) -> str:
    points = difference["points"]
    if _keeps(difference):
        return "nothing is lost"
    if difference["high"] >= 0:
        return (
            f"whether {metric} is lost this test cannot tell ({difference['low']:+.1f} to "
            f"{difference['high']:+.1f} points)"
        )
    return f"{-points:.1f} points of {metric} are lost"


def _saved(time: dict) -> str:
    share = 1 - time["ratio"]
    if abs(share) < 0.005:
        return "save no time"
    return f"save {share:.0%} of the time" if share > 0 else f"take {-share:.0%} longer"


def _third(saved: str) -> str:
    verb, _, rest = saved.partition(" ")
    return f"{verb}s {rest}"


def _share(keep: float) -> str:
    return {0.5: "half", 0.25: "a quarter", 0.75: "three quarters"}.get(keep, f"{keep:.0%}")


def metric_title(entry: dict) -> str:
    """What methods are compared by."""
    return entry["metric"]["title"] if "metric" in entry else "accuracy"


def _value(entry: dict) -> str:
    if "metric" in entry:
        return f"{100 * entry['metric']['value']:.1f}"
    return f"{entry['accuracy']:.1%}"


def _tiles(entry: dict, dense: dict, difference: dict) -> list[dict]:
    time = entry["latency"][0]
    spread = ""
    if time["ratio_low"] is not None and time["ratio_high"] is not None:
        spread = f" ({time['ratio_low']:.2f} to {time['ratio_high']:.2f})"
    reach = f"({difference['low']:+.1f} to {difference['high']:+.1f})"
    return [
        {
            "label": metric_title(entry),
            "value": _value(entry),
            "note": f"dense {_value(dense)}; {difference['points']:+.1f} points {reach}",
        },
        {
            "label": "time",
            "value": f"{100 * (time['ratio'] - 1):+.0f}%".replace("-", "−"),
            "note": f"{time['ratio']:.2f} of dense{spread}; {shape_text(time)}",
        },
        {
            "label": "heads",
            "value": f"{entry['heads_mean']:.0%}",
            "note": "dense 100%; "
            + (
                "chosen for every input"
                if entry["kind"] == "dynamic"
                else "the same for every input"
            ),
        },
    ]
