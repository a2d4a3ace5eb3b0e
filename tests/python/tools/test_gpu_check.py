"""benchmarks/gpu_check.py without a GPU: every case of it on small shapes, and its bookkeeping."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_summary  # noqa: E402


def rehearse(rows, *groups):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--rehearse", "--rows", rows]
    return subprocess.run(
        [*command, *groups],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_case_can_be_rehearsed(tmp_path):
    """Names, shapes and checks of all that a GPU's time would be spent on; a wall clock's times."""
    path = tmp_path / "rows.jsonl"
    done = rehearse(path)
    rows = gpu_summary.read(path)
    assert done.returncode == 0, done.stdout + done.stderr + path.with_suffix(".log").read_text()
    assert "REHEARSAL" in done.stdout
    names = [name for group in gpu_check.GROUPS for name in gpu_check.cases(group, True)]
    assert [row["case"] for row in rows if "done" in row] == names
    assert all(row["passed"] for row in rows if "check" in row)
    timed = {row["variant"] for row in rows if "median_ms" in row and row["case"] in names}
    assert {"dense", "kernels", "flash", "warpgroups", "masked", "full", "flex", "gate"} <= timed
    assert not [row for row in rows if row.get("note") or row.get("no_graph")]
    energy = {row["variant"]: row["energy"] for row in rows if "energy" in row}
    assert energy.keys() == {"kernels", "dense", "full"}
    for own in energy.values():
        assert own["why"] is None and own["source"] == ["gpu:0"]
        assert own["joules"]["median"] > 0 and own["ratio"]["joules"]["median"] == pytest.approx(1)
    assert energy["dense"]["ratio"]["macs"] == 0.5 < energy["kernels"]["ratio"]["macs"] < 1
    assert "J per call, 1 of all heads; idle " in done.stdout
    # Finished cases are not run again.
    assert "passed" in rehearse(path, "gate").stdout
    assert len(gpu_summary.read(path)) == len(rows)


def test_a_rehearsal_writes_no_results():
    done = rehearse(ROOT / "benchmarks" / "results" / "gpu_rehearsal.jsonl", "gate")
    assert done.returncode == 2 and "no place among results" in done.stderr
    assert not (ROOT / "benchmarks" / "results" / "gpu_rehearsal.jsonl").exists()


class Clock:
    """A machine on which every call takes the same time."""

    rehearsal = True

    def __init__(self, milliseconds):
        self.each, self.calls = milliseconds, []

    def synchronize(self):
        pass

    def milliseconds(self, runs):
        for run in runs:
            run()
        self.calls.append(len(runs))
        return self.each * len(runs)

    def captured(self, run):
        return run, None

    def free_bytes(self):
        return 24 << 30


@pytest.mark.parametrize(("milliseconds", "at_once"), [(0.004, 50), (0.1, 10), (3.0, 1)])
def test_short_calls_are_timed_many_at_a_time(milliseconds, at_once):
    seen = []
    machine = Clock(milliseconds)
    timer = gpu_machine.Timer(machine, repeats=3)
    assert timer(*(lambda n=n: seen.append(n) for n in range(2))) == pytest.approx(milliseconds)
    assert machine.calls == [2, *[at_once] * 3]
    timed = seen[6:]  # after two calls of each to warm up, and one to see how long they take
    assert timed == [n % 2 for n in range(len(timed))]  # in turn


def test_the_oracle_fits_in_memory():
    shape = gpu_machine.checked_part(Clock(1), batch=8, heads=16, length=4096)
    assert shape == (1, 2048)
    assert gpu_machine.checked_part(Clock(1), batch=64, heads=12, length=197) == (2, 197)


def test_goals_compare_the_same_kind_of_timing():
    case = "forward (8, 64, 32, 4) k=2"
    times = [
        ("dense", "events", 2.0),
        ("dense", "graph", 1.0),
        ("kernels", "events", 3.0),
        ("kernels", "graph", 1.05),
        ("flash", "events", 1.9),
        ("masked", "events", 6.0),
    ]
    rows = [{"case": case, "variant": v, "timed_by": t, "median_ms": ms} for v, t, ms in times]
    found = {(g["variant"], g["what"]): g for g in gpu_summary.goals(rows)}
    assert found["kernels", "kernels (graph)"]["value"] == pytest.approx(1.05)
    assert found["kernels", "kernels (graph)"]["reached"]
    assert found["flash", "flash (events)"]["value"] == pytest.approx(0.95)
    assert found["kernels", "masked over it"]["value"] == pytest.approx(2.0)


def test_energy_that_was_not_measured_is_one_line():
    found = {"why": "NVML does not answer", "joules": None, "ratio": {"joules": None}}
    rows = [{"case": "energy", "variant": name, "energy": found} for name in ("kernels", "full")]
    assert gpu_summary.energy(rows) == ["energy: energy was not measured: NVML does not answer"]


def test_rows_that_were_cut_short_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"case": "gate", "done": True}) + '\n{"case": "ga')
    assert gpu_summary.read(path) == [{"case": "gate", "done": True}]
    assert gpu_summary.read(tmp_path / "none.jsonl") == []
