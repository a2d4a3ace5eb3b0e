"""Rows of gpu_check against the goals: a short table, and everything as JSON."""

import json

GOALS = (
    "goals: forward <= 1.10 and training <= 1.15 of the dense layer of k heads (k = H: 1.05), "
    "memory <= 1.05, masked and flex >= 1.5 times its time; attention <= 0.55 of the best of all "
    "heads; decode >= 0.85 of the bandwidth of a copy; gate and work list <= 15 us. * missed"
)


def read(path):
    """The rows of a .jsonl file; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def numbers(rows, key="median_ms"):
    """{case: {(variant, timed_by): number}}, the last of each."""
    found = {}
    for row in rows:
        if key in row:
            place = found.setdefault(row["case"], {})
            place[row.get("variant"), row.get("timed_by")] = row[key]
    return found


def goal(case, variant, what, value, limit, lower_is_better=True):
    reached = value <= limit if lower_is_better else value >= limit
    sign = "at most" if lower_is_better else "at least"
    return {"case": case, "variant": variant, "what": what, "value": value, "goal": limit,
            "goal_is": sign, "reached": reached}  # fmt: skip


def layer_goals(case, times, peaks, times_of_flex):
    what, k = case.split()[0], int(case.rsplit("=", 1)[1])
    heads = int(case[: case.index(")")].rsplit(",", 1)[1])
    limit = 1.15 if what == "training" else (1.05 if k == heads else 1.10)
    rows = []
    for way in ("kernels", "flash", "warpgroups"):
        # Graph replays on both sides where both could be captured, else launches on both.
        by = "graph" if {(way, "graph"), ("dense", "graph")} <= times.keys() else "events"
        if (way, by) not in times or ("dense", by) not in times:
            continue
        ours = times[way, by]
        rows.append(goal(case, way, f"{way} ({by})", ours / times["dense", by], limit))
        if (way, by) in peaks and peaks.get(("dense", by)):
            rows.append(goal(case, way, "memory", peaks[way, by] / peaks["dense", by], 1.05))
        if what == "forward" and 2 * k == heads and (way, "events") in times:
            for other, table in (("masked", times), ("flex", times_of_flex)):
                if (other, "events") in table:
                    faster = table[other, "events"] / times[way, "events"]
                    rows.append(goal(case, way, f"{other} over it", faster, 1.5, False))
    return rows


def goals(rows):
    times, peaks = numbers(rows), numbers(rows, "peak_bytes")
    bandwidth = [r["bytes_per_second"] for r in rows if r["case"] == "bandwidth" and "done" not in r
                 and "bytes_per_second" in r]  # fmt: skip
    reached = []
    for case, table in times.items():
        group = case.split()[0]
        if group in ("forward", "training"):
            flex = times.get(case.replace("forward", "flex"), {})
            reached += layer_goals(case, table, peaks.get(case, {}), flex)
        elif group == "attention":
            dense = [ms for (name, _), ms in table.items() if name.startswith("all heads")]
            for way in ("kernels", "flash"):
                if (way, None) in table and dense:
                    ratio = table[way, None] / min(dense)
                    reached.append(goal(case, way, way, ratio, 0.55))
        elif case == "gate":
            for (name, _), ms in table.items():
                reached.append(goal(case, name, f"{name} us", 1e3 * ms, 15.0))
    for case, table in numbers(rows, "bytes_per_second").items():
        if case != "bandwidth" and bandwidth:
            ratio = next(iter(table.values())) / bandwidth[-1]
            reached.append(goal(case, "kernels", "bandwidth", ratio, 0.85, False))
    return reached


def energy(rows):
    """A line for each variant whose energy was measured, or the reason why it was not."""
    lines = []
    for row in rows:
        found = row.get("energy")
        if not found:
            continue
        if found["why"]:
            lines.append(f"{row['case']}: energy was not measured: {found['why']}")
        else:
            over = found["ratio"]["joules"]
            over = f", {over['median']:.3g} of all heads" if over else ""
            lines.append(
                f"{row['case']}: {row['variant']} {found['joules']['median']:.3g} J per call"
                f"{over}; idle {', '.join(f'{own:.0f}' for own in found['idle_watts'])} W"
            )
    return list(dict.fromkeys(lines))


def report(path):
    """Prints the table, writes it with all rows beside `path`; 1 if any case failed."""
    rows = read(path)
    found = goals(rows)
    checks = [row for row in rows if "check" in row]
    wrong = [row for row in checks if not row["passed"]]
    died = [row for row in rows if "died" in row]
    by_case = {}
    for row in found:
        by_case.setdefault(row["case"], []).append(row)
    environment = [row["environment"] for row in rows if "environment" in row]
    rehearsal = bool(environment) and environment[-1].get("rehearsal", False)
    if rehearsal:
        print(f"REHEARSAL by {environment[-1]['operators']}: times and ratios mean nothing")
    print(GOALS)
    for case, numbers_ in by_case.items():
        line = (f"{row['what']} {row['value']:.3g}{'' if row['reached'] else '*'}"
                for row in numbers_)  # fmt: skip
        print(f"{case}: {', '.join(line)}")
    for line in energy(rows):
        print(line[:250])
    for row in wrong:
        print(f"WRONG {json.dumps(row)}"[:300])
    for row in died:
        print(f"DIED {row['case']}: {row['died']}"[:300])
    notes = {}
    for row in rows:
        for key in ("no_graph", "note"):
            if row.get(key):
                notes.setdefault(row[key], []).append(f"{row['case']} {row.get('variant', '')}")
    for note, places in list(notes.items())[:10]:
        print(f"note, {len(places)} times ({places[0]}): {note}"[:250])
    passed = not wrong and not died and bool(checks)
    result = {"environment": environment[-1] if environment else None, "passed": passed,
              "goals": found, "rows": rows}  # fmt: skip
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path.with_suffix(".json"))
    print(f"{'rehearsal ' * rehearsal}{'passed' if passed else 'FAILED'}: {len(checks)} checks, "
          f"{len(wrong)} wrong, "
          f"{len(died)} cases died; {sum(r['reached'] for r in found)} of {len(found)} goals "
          f"reached; {path.with_suffix('.json')}")  # fmt: skip
    return 0 if passed else 1
