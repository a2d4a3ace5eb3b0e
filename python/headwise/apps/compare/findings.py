"""The findings of a study: means over seeds, comparisons, and sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.apps.compare import heads_of_kinds, metrics
from headwise.apps.compare.calibration import TOLERANCE
from headwise.apps.compare.statistics import mean_interval, paired_difference
from headwise.apps.compare.verdict import shape_text
from headwise.apps.energy.windows import PROXIES

#: Below both of these a dynamic method chooses practically the same heads for every input.
STATIC_IN_DISGUISE = {"heads_std": 0.02, "jaccard_distance": 0.05}

_AVERAGED = (
    "heads_mean",
    "heads_std",
    "jaccard_distance",
    "latency_ms",
    "latency_ratio_to_dense",
    "macs_ratio_to_dense",
    "attention_macs_ratio_to_dense",
    "validation_accuracy",
)


def summarise(runs: Sequence[dict]) -> list[dict]:
    """One entry for each task, method and budget: the mean over seeds.

    ``accuracy_low`` and ``accuracy_high`` are a 95% interval: of the mean over seeds (Student's t)
    if there are several, else of the one proportion (Wilson). ``missed``: the average share of
    heads on the test (of a method that prunes more: of its own measure) is further than 2 points
    from the target.
    """
    grouped: dict[tuple, list[dict]] = {}
    for run in runs:
        grouped.setdefault((run["task"], run["method"], run["keep_target"]), []).append(run)
    found = []
    for (task, method, keep), group in grouped.items():
        mean, low, high = mean_interval([run["accuracy"] for run in group])
        if len(group) == 1:
            low, high = group[0]["accuracy_interval"]
        entry = {
            "task": task,
            "method": method,
            "title": group[0]["title"],
            "kind": group[0]["kind"],
            "keep_target": keep,
            "seeds": len(group),
            "accuracy": mean,
            "accuracy_low": max(0.0, low),
            "accuracy_high": min(1.0, high),
            "train_steps": group[0]["train_steps"],
        }
        for name in _AVERAGED:
            entry[name] = sum(run[name] for run in group) / len(group)
        latencies = [run["latency"] for run in group]
        entry["latency"] = [_time(list(times)) for times in zip(*latencies, strict=True)]
        if "energy" in group[0]:
            entry["energy"] = _energy([run["energy"] for run in group])
        if all("method_seconds" in run for run in group):
            entry["method_seconds"] = sum(run["method_seconds"] for run in group) / len(group)
        if "metric" in group[0]:
            entry["metric"] = metrics.summarised(group)
        if "domains" in group[0]:
            entry["domains"] = [
                {
                    "name": domain["name"],
                    **{
                        key: sum(run["domains"][i][key] for run in group) / len(group)
                        for key in ("accuracy", "heads_mean")
                    },
                }
                for i, domain in enumerate(group[0]["domains"])
            ]
        if "heads_by_attention" in group[0]:
            shares = [run["heads_by_attention"] for run in group]
            entry["heads_by_attention"] = {
                kind: statistics.fmean(own[kind] for own in shares) for kind in shares[0]
            }
        # A method that prunes more than heads has its budget in something else.
        entry["whole_model"] = "share_kept" in group[0]
        kept = [run.get("share_kept", run["heads_mean"]) for run in group]
        entry["missed"] = abs(sum(kept) / len(kept) - keep) > TOLERANCE
        found.append(entry)
    return found


def _time(times: list[dict]) -> dict:
    """One shape's latency: the mean over seeds, with the range of their ratios; of one seed, and of
    the dense model, whose ratio is 1 by definition, the quartiles of the rounds."""
    ratios = [time["ratio"] for time in times]
    low, high = min(ratios), max(ratios)
    if low == high:
        ends = [[time[name] for time in times] for name in ("ratio_low", "ratio_high")]
        known = all(end is not None for end in (*ends[0], *ends[1]))
        low, high = (min(ends[0]), max(ends[1])) if known else (None, None)
    return {
        "batch": times[0]["batch"],
        "length": times[0]["length"],
        "ms": sum(time["ms"] for time in times) / len(times),
        "ratio": sum(ratios) / len(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def _energy(found: list[dict]) -> dict:
    """Over the dense model: mean joules over seeds with their range (with one seed: the quartiles
    of its rounds), and mean proxies; ``why`` if a seed has no joules. ``joules_per_input``: of the
    model itself, above idle power."""
    ratios = [own["ratio"] for own in found]
    whys = [own["why"] for own in found if own["why"] is not None]
    joules = [ratio["joules"] for ratio in ratios]
    if not whys and None in joules:
        whys = ["the energy was within the noise of the idle power"]
    entry: dict = {"why": whys[0] if whys else None, "joules": None}
    if not whys:
        medians = [own["median"] for own in joules]
        low, high = min(medians), max(medians)
        if len(joules) == 1:
            low, high = joules[0]["low"], joules[0]["high"]
        entry["joules"] = {"ratio": statistics.fmean(medians), "low": low, "high": high}
        entry["joules_per_input"] = statistics.fmean(
            own["contenders"]["model"]["joules"]["median"] / own["batch"] for own in found
        )
        entry["idle_watts"] = statistics.fmean(w for own in found for w in own["idle_watts"])
        entry["source"] = found[0]["source"]
    for proxy in PROXIES:
        values = [ratio[proxy] for ratio in ratios]
        entry[proxy] = None if None in values else statistics.fmean(values)
    return entry


def _correct(runs: Sequence[dict]) -> Tensor:
    """[N]: how often each test input was right, the mean over the runs."""
    rows = [torch.tensor([float(character) for character in run["correct"]]) for run in runs]
    return torch.stack(rows).mean(0)


def _difference(first: Sequence[dict], second: Sequence[dict]) -> dict:
    """Points of the metric, or of accuracy, between the runs of two methods, with the interval."""
    if "metric" in first[0]:
        found = metrics.difference(first, second)
    else:
        found = paired_difference(_correct(first), _correct(second))
    return {name: 100 * value for name, value in zip(("points", "low", "high"), found, strict=True)}


def _best(entries: Sequence[dict], kind: str) -> dict | None:
    """The best of a kind on validation inputs, independent of the test.

    Only methods with a budget in heads: one that prunes more has another number of them.
    """
    candidates = [
        entry for entry in entries if entry["kind"] == kind and not entry.get("whole_model")
    ]
    return max(candidates, key=_validation, default=None)


def _validation(entry: dict) -> float:
    return entry["metric"]["validation"] if "metric" in entry else entry["validation_accuracy"]


def _runs_of(runs: Sequence[dict], task: str, method: str, keep: float) -> list[dict]:
    wanted = (task, method, keep)
    return [r for r in runs if (r["task"], r["method"], r["keep_target"]) == wanted]


def compare(runs: Sequence[dict], summary: Sequence[dict]) -> list[dict]:
    """For each task and budget: the best dynamic method against the dense model and against the
    best static method, each chosen on validation inputs.

    Differences are paired over test inputs; intervals are 95% of a bootstrap over inputs.
    """
    found = []
    for task, keep in dict.fromkeys((e["task"], e["keep_target"]) for e in summary):
        entries = [e for e in summary if e["task"] == task and e["keep_target"] == keep]
        dynamic, static = _best(entries, "dynamic"), _best(entries, "static")
        if dynamic is None and static is None:
            continue
        comparison: dict = {"task": task, "keep_target": keep}
        dense = _runs_of(runs, task, "dense", 1.0)
        own = {}
        for name, entry in (("dynamic", dynamic), ("static", static)):
            if entry is not None:
                own[name] = _runs_of(runs, task, entry["method"], keep)
                comparison[name] = entry["method"]
                comparison[f"{name}_minus_dense"] = _difference(own[name], dense)
        if len(own) == 2:
            comparison["dynamic_minus_static"] = _difference(own["dynamic"], own["static"])
        found.append(comparison)
    return found


def _kept(entry: dict) -> str:
    if "metric" in entry:
        return f"{100 * entry['metric']['value']:.1f} of {entry['metric']['title']}"
    return f"{entry['accuracy']:.1%}"


def _points(difference: dict) -> str:
    return (
        f"{difference['points']:+.1f} points "
        f"(95% interval {difference['low']:+.1f} to {difference['high']:+.1f})"
    )


def _verdict(difference: dict, first: str, second: str) -> str:
    if difference["low"] > 0:
        return f"{first} is better"
    if difference["high"] < 0:
        return f"{second} is better"
    return "the test cannot tell them apart"


def sentences(result: dict) -> list[str]:
    """The findings and missed budgets in plain words, the most important first."""
    summary, found = result["summary"], []
    entries = {(e["task"], e["method"], e["keep_target"]): e for e in summary}
    several = len({e["task"] for e in summary}) > 1
    for comparison in result["comparisons"]:
        task, keep = comparison["task"], comparison["keep_target"]
        where = f"{task}, {keep:.0%} of heads" if several else f"At {keep:.0%} of the heads"
        parts = []
        for name in ("dynamic", "static"):
            if name in comparison:
                entry = entries[task, comparison[name], keep]
                parts.append(
                    f"the best {name} method ({entry['title']}) keeps {_kept(entry)}, "
                    f"{_points(comparison[f'{name}_minus_dense'])} from dense"
                )
        text = f"{where}: " if several else f"{where} "
        text += "; ".join(parts) + "."
        if "dynamic_minus_static" in comparison:
            difference = comparison["dynamic_minus_static"]
            text += (
                f" Dynamic against static: {_points(difference)}; "
                f"{_verdict(difference, 'dynamic', 'static')}."
            )
        found.append(text)
    found += _selection_sentences(summary)
    found += _domain_sentences(summary)
    found += _time_sentences(summary)
    found += _energy_sentences(summary)
    for attention in result.get("attention", ()):
        found += heads_of_kinds.sentences(attention)
    missed = [e for e in summary if e["missed"]]
    for e in missed:
        found.append(
            f"Missed: {e['title']} on {e['task']} runs {e['heads_mean']:.1%} of the heads, more "
            f"than 2 points from its target of {e['keep_target']:.0%}; compare it with care."
        )
    if len({run["seed"] for run in result["runs"]}) == 1:
        found.append(
            "One seed: differences under about a point are within what another seed would change."
        )
    return found


def _selection_sentences(summary: Sequence[dict]) -> list[str]:
    """One for each dynamic method and task: whether its selections differ between
    inputs."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for entry in summary:
        if entry["kind"] == "dynamic":
            groups.setdefault((entry["task"], entry["title"]), []).append(entry)
    several = len({task for task, _ in groups}) > 1
    found = []
    for (task, title), entries in groups.items():
        where = f" on {task}" if several else ""
        parts = [
            f"at {e['keep_target']:.0%} by {100 * e['heads_std']:.1f} points and "
            f"{e['jaccard_distance']:.2f}"
            for e in entries
        ]
        disguised = [
            e for e in entries if all(e[key] < limit for key, limit in STATIC_IN_DISGUISE.items())
        ]
        if entries[0]["method"] == "budget-random":
            verdict = "draws heads without looking at the input"
        elif len(disguised) == len(entries):
            verdict = "is static in disguise"
        elif disguised:
            budgets = ", ".join(f"{e['keep_target']:.0%}" for e in disguised)
            verdict = f"chooses by the input, but is static in disguise at {budgets}"
        else:
            verdict = "chooses by the input"
        found.append(
            f"{title}{where} {verdict}: inputs differ in how many heads they run (standard "
            f"deviation) and in which (mean Jaccard distance) {', '.join(parts)}."
        )
    return found


def _domain_sentences(summary: Sequence[dict]) -> list[str]:
    """One for each dynamic method of a task with domains: how its heads are distributed."""
    found = []
    for e in summary:
        if e["kind"] != "dynamic" or "domains" not in e:
            continue
        most = max(e["domains"], key=lambda domain: domain["heads_mean"])
        least = min(e["domains"], key=lambda domain: domain["heads_mean"])
        found.append(
            f"{e['title']} on {e['task']} at {e['keep_target']:.0%} gives {most['name']} the most "
            f"heads ({most['heads_mean']:.1%}) and {least['name']} the fewest "
            f"({least['heads_mean']:.1%})."
        )
    return found


def _time_sentences(summary: Sequence[dict]) -> list[str]:
    """One for each shape, of the models that were trained: which dynamic ones were faster than the
    dense model, and what choosing by the input costs over removing the same number of heads."""
    dynamic = [e for e in summary if e["kind"] == "dynamic"]
    found = []
    for place, shape in enumerate(dynamic[0]["latency"] if dynamic else []):
        timed = sorted(dynamic, key=lambda e: e["heads_mean"])
        ratios = [e["latency"][place]["ratio"] for e in timed]
        faster = [ratio < 1 for ratio in ratios]
        where = shape_text(shape)
        text = f"{where[0].upper()}{where[1:]}: "
        if all(faster):
            text += "every dynamic model was faster than dense"
        elif not any(faster):
            text += "no dynamic model was faster than dense"
        else:
            text += f"{sum(faster)} of {len(faster)} dynamic models were faster than dense"
            up_to = faster.index(False)
            if up_to and not any(faster[up_to:]):
                text += f", those with up to {timed[up_to - 1]['heads_mean']:.0%} of the heads"
        text += f" ({min(ratios):.2f} to {max(ratios):.2f} of its time)"
        prices = [
            e["latency"][place]["ratio"] / s["latency"][place]["ratio"] - 1
            for e in dynamic
            for s in summary
            if s["kind"] == "static" and not s["whole_model"] and not s["missed"]
            if (s["task"], s["keep_target"]) == (e["task"], e["keep_target"]) and not e["missed"]
        ]
        if prices:
            middle = statistics.median(prices)
            costs = "longer" if middle > 0 else "less"
            text += (
                f"; at the same budget it took {abs(middle):.0%} {costs} than a pruned model, in "
                f"the median ({min(prices):+.0%} to {max(prices):+.0%})"
            )
        found.append(text + ".")
    return found


def _energy_sentences(summary: Sequence[dict]) -> list[str]:
    """How energy was measured, or why it was not; nothing if no one asked."""
    own = [e["energy"] for e in summary if "energy" in e]
    measured = [e for e in own if e["joules"] is not None]
    found = []
    if measured:
        watts = statistics.median(e["idle_watts"] for e in measured)
        found.append(
            f"Energy is that of {', '.join(measured[0]['source'])} above the idle power, "
            f"{watts:.1f} W in the median."
        )
    for why in dict.fromkeys(e["why"] for e in own if e["why"] is not None):
        number = sum(e["why"] == why for e in own)
        of = "" if number == len(own) else f" of {number} of {len(own)} models"
        found.append(f"Energy{of} was not measured: {why}.")
    return found
