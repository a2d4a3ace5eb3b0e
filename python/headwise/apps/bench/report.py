"""Results as lines on the terminal, and as one document."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from headwise.apps.bench.settings import Settings
from headwise.apps.energy.windows import text as energy_text

FORMAT, VERSION = "headwise.bench", 1


def document(settings: Settings, results: Sequence[dict], environment: dict) -> dict:
    """The document of ``--json``."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment,
        "settings": {
            "clock": settings.clock,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "fractions": list(settings.fractions),
            **({"energy": asdict(settings.energy)} if settings.energy is not None else {}),
        },
        "results": list(results),
        "goals": summary(results),
    }


def summary(results: Sequence[dict]) -> list[dict]:
    """For each goal, how many results met it, and the worst."""
    found: dict[str, dict] = {}
    for result in results:
        goal = result.get("goal")
        if not goal:
            continue
        entry = found.setdefault(
            goal["name"],
            {"name": goal["name"], "limit": goal["limit"], "met": 0, "of": 0, "worst": None},
        )
        value = judged(result)
        entry["of"] += 1
        entry["met"] += bool(goal["met"])
        if entry["worst"] is None or value > entry["worst"]:
            entry["worst"] = value
    return list(found.values())


def judged(result: dict) -> float:
    """The ratio that the goal is about."""
    ratio = result["ratio"]
    return ratio["yardstick"]["median"] if "yardstick" in ratio else ratio["call"]


def load() -> list[float] | None:
    """The machine's load averages, if available, to show other work."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def header(environment: dict) -> list[str]:
    about = (
        f"{environment['processor']}, {environment['cores']} cores, "
        f"{environment['instructions']}, torch {environment['torch']}, {environment['device']}"
    )
    if environment.get("load"):
        about += f"; load average {environment['load'][0]}"
    columns = (
        f"{'':<7} {'B,L,D,H':>14} {'dtype':>8} {'thr':>3} {'heads':>6} "
        f"{'headwise ms':>12} {'over':>16} {'ratio':>6} {'quartiles':>13}  goal"
    )
    return [about, "", columns]


def line(result: dict) -> str:
    """One result."""
    what = result["what"]
    shape = ",".join("" if n is None else str(n) for n in result.get("shape", []))
    start = f"{what:<7} {shape:>14} {result['dtype']:>8} {result['threads']:>3} "
    if what == "line":
        return (
            f"{start}{'':>6} {result['intercept']:.2f} ms + {result['slope']:.2f} ms per head, "
            f"R^2 {result['r_squared']:.4f} ({result['of']})"
        )
    if what == "break-even":
        return (
            f"{start}{result['heads']} of {result['of_heads']} heads cost less than the dense "
            f"layer from batch {_from(result['batch'])} (128 tokens) and from length "
            f"{_from(result['length'])} (8 sequences)"
        )
    if what == "memory":
        return start + _memory(result)
    yardstick, ratio = result["yardstick"], result["ratio"]["yardstick"]
    own = result.get("gate") or next(iter(result["ms"]))
    heads = result.get("heads", "")
    heads = f"{heads:.1f}" if isinstance(heads, float) else str(heads)
    text = (
        f"{start}{heads:>6} {result['ms'][own]['median']:>12.3f} {yardstick[:16]:>16} "
        f"{ratio['median']:>6.3f} {ratio['low']:>6.3f}-{ratio['high']:<6.3f}  {_goal(result)}"
    )
    others = [
        f"{name} {value['median']:.2f}"
        for name, value in result["ratio"].items()
        if name != "yardstick"
    ]
    if "speed_up" in result and result["threads"] > 1:
        gain = ", ".join(f"{name} {value:.2f}" for name, value in result["speed_up"].items())
        others.append(f"faster than one thread: {gain}")
    elif "gate" in result:
        others.insert(0, result["gate"])
    elif others:
        others[0] = "over " + others[0]
    return text + (f"  ({', '.join(others)})" if others else "")


def energy(result: dict) -> list[str]:
    """The lines of a result's energy, if it was measured or its proxies were."""
    if "energy" not in result:
        return []
    return [f"{'':<8}{line}" for line in energy_text(result["energy"], "dense")]


def _from(size: int | None) -> str:
    return "none of those tried" if size is None else str(size)


def _memory(result: dict) -> str:
    if "skipped" in result:
        return result["skipped"]
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in
                      result["call_bytes"].items())  # fmt: skip
    return f"{result['of']}: {sizes}; ratio {result['ratio']['call']:.2f}  {_goal(result)}"


def _goal(result: dict) -> str:
    goal = result.get("goal")
    if not goal:
        return ""
    return f"{'met' if goal['met'] else 'missed'} (<= {goal['limit']:g})"


def closing(goals: Sequence[dict]) -> list[str]:
    """The goals, one per line."""
    if not goals:
        return []
    width = max(len(goal["name"]) for goal in goals)
    lines = ["", f"{'goal':<{width}}  {'limit':>5}  {'worst':>6}  met"]
    for goal in goals:
        lines.append(
            f"{goal['name']:<{width}}  {goal['limit']:>5g}  {goal['worst']:>6.3f}  "
            f"{goal['met']} of {goal['of']}"
        )
    return lines
