"""Checks headwise on a CUDA device against the oracle in float64, then times it.

    python benchmarks/gpu_check.py                      # all groups; writes results/gpu_<device>.*
    python benchmarks/gpu_check.py forward decode       # some of them
    python benchmarks/gpu_check.py --rehearse           # every case without a GPU: measures nothing
    python benchmarks/gpu_check.py --summary results/gpu_h200.jsonl

A layer that runs k of H heads, its gate included, is timed beside the dense layer that has only k
heads, beside the full dense layer, beside computing all heads and multiplying by a mask, and beside
FlexAttention with a mask of heads (gpu_layer.py); then attention alone, decoding, and the gate
(gpu_cases.py); then the energy of a layer, if the package zeus can read the GPU's counter
(gpu_energy.py). Nothing is timed that has not passed its check.

Every row is a line of gpu_<device>.jsonl as soon as it is measured, and existing rows are not
measured again: an interrupted run resumes where it ended. Cases run in a separate process, which is
replaced if one of them kills it: a faulty kernel costs only its own case. The last lines compare
with the goals; gpu_<device>.json holds everything. Exit status 1: a check failed, or a case died.

A rehearsal runs every line of this on small shapes: the kernels on the emulated device of the tests
where tests/cpp is built, a wall clock instead of events, nothing instead of graphs. It finds a
wrong name or shape before a GPU's time is spent on it. Its rows go to a temporary folder.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_summary  # noqa: E402

# The table that the benchmarks share. A rehearsal has heads that are copied 16 bytes at a time, and
# heads that are not.
TABLE = json.loads((ROOT / "python/headwise/apps/bench/cases.json").read_text())["gpu"]
GROUPS = ("gate", "forward", "attention", "decode", "training", "energy", "flex")
CASE_SECONDS = 150  # then it hangs


def cases(group, rehearse):
    """The names of a group's cases, the most telling first."""
    shapes = [tuple(s) for s in TABLE["rehearsal" if rehearse else "shapes"]]
    if group in ("forward", "training"):
        halves = [(s, s[3] // 2) for s in shapes]
        others = [(s, k) for s in shapes for k in (s[3] // 4, 3 * s[3] // 4, s[3])]
        return [f"{group} {s} k={k}" for s, k in halves + others]
    if group in ("attention", "flex"):
        return [f"{group} {s} k={s[3] // 2}" for s in shapes]
    if group == "decode":
        caches = TABLE["caches of a rehearsal" if rehearse else "caches"]
        return [f"decode B={b} keys={s}" for b, s in caches]
    if group == "energy":
        return [f"energy {shapes[0]} k={shapes[0][3] // 2}"]  # a minute and a half
    return ["bandwidth", "gate"]


# ---- The worker: runs the cases that it is given on stdin, one after another. ----


def work(options):
    import gpu_cases
    import gpu_layer
    import gpu_machine
    import torch

    machine = gpu_machine.Host() if options.rehearse else gpu_machine.Gpu(options.device)
    operators = "the CUDA device"
    if options.rehearse:
        import gpu_rehearsal

        found, operators = gpu_rehearsal.operators()
        gpu_layer.ops = gpu_cases.ops = found
    timer = gpu_machine.Timer(machine, options.repeats)
    with options.rows.open("a") as file:
        for line in sys.stdin:
            name = line.rstrip("\n")
            print(f"> {name}", flush=True)

            def emit(row, name=name):
                file.write(json.dumps({"case": name, **row}) + "\n")
                file.flush()

            torch.manual_seed(0)
            try:
                if name == "bandwidth":
                    emit({"environment": environment(machine, operators)})
                run_case(name, emit, timer, getattr(torch, options.dtype))
            except torch.OutOfMemoryError as error:
                emit({"note": gpu_machine.first_line(error)})
            machine.release()
            emit({"done": True})
            print(f"< {name}", flush=True)


def run_case(name, emit, timer, dtype):
    import gpu_cases
    import gpu_layer

    group, tolerance = name.split()[0], gpu_layer.TOLERANCE[dtype][0]
    rehearse = timer.machine.rehearsal
    if group in ("forward", "training", "attention", "energy", "flex"):
        shape = tuple(int(n) for n in name[name.index("(") + 1 : name.index(")")].split(","))
        k = int(name.rsplit("=", 1)[1])
    if group in ("forward", "training"):
        gpu_layer.case(emit, group, shape, k, dtype, timer)
    elif group == "attention":
        gpu_cases.attention_core(emit, shape, dtype, timer, tolerance, gpu_layer.route)
    elif group == "energy":
        import gpu_energy

        gpu_energy.case(emit, shape, k, dtype, timer.machine)
    elif group == "flex":
        gpu_layer.flex_case(emit, shape, dtype, timer)
    elif group == "decode":
        batch, keys = (int(word.split("=")[1]) for word in name.split()[1:])
        sizes = (8, 2, 16) if rehearse else (32, 8, 128)
        gpu_cases.decoding(emit, batch, keys, dtype, timer, tolerance, sizes)
    elif group == "bandwidth":
        emit({"bytes_per_second": gpu_cases.copy_bandwidth(timer)})
    else:
        small = {"batch": 4, "heads": 4, "width": 16, "length": 5} if rehearse else {}
        gpu_cases.gate(emit, dtype, timer, **small)


def environment(machine, operators):
    import headwise as hw
    import torch

    return {
        "rehearsal": machine.rehearsal,
        "device": machine.name,
        "operators": operators,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "headwise": hw.__version__,
        "backends": [
            {"name": b.name, "device": b.device, "available": b.available, "reason": b.reason}
            for b in hw.backends()
        ],
    }


# ---- The driver. ----


class Worker:
    """A process that runs cases, and its output."""

    def __init__(self, options):
        command = [sys.executable, __file__, "--worker", "--rows", str(options.rows)]
        command += ["--device", options.device, "--dtype", options.dtype]
        command += ["--repeats", str(options.repeats)] + ["--rehearse"] * options.rehearse
        paths = [str(ROOT / "tests" / "python"), os.environ.get("PYTHONPATH", "")]
        self.log = options.rows.with_suffix(".log").open("a+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )
        self.said = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put(None)  # the process has ended

    def run(self, name, seconds):
        """None, or why the case did not end."""
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return "the process had ended"
        begin = time.monotonic()
        while True:
            try:
                line = self.said.get(timeout=max(0.1, begin + seconds - time.monotonic()))
            except queue.Empty:
                return f"not done after {seconds:.0f} s"
            if line is None:
                return f"exit status {self.process.wait()}: {self.last_line()}"
            if line == f"< {name}\n":
                return None

    def last_line(self):
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or [""])[-1].strip()[:200]

    def end(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


def drive(options, names):
    """Runs the cases that have no line yet; those for which no time is left."""
    finished = {row["case"] for row in gpu_summary.read(options.rows) if finishing(row, options)}
    worker, left_out = None, []
    begin = time.monotonic()
    for name in names:
        if name in finished:
            continue
        left = options.seconds - (time.monotonic() - begin)
        if left < 10:
            left_out.append(name)
            continue
        worker = worker or Worker(options)
        reason = worker.run(name, min(CASE_SECONDS, left))
        if reason is None:
            continue
        # Cut short by the clock: it runs again, with more time.
        if not (reason.startswith("not done") and left < CASE_SECONDS):
            with options.rows.open("a") as file:
                file.write(json.dumps({"case": name, "died": reason}) + "\n")
        else:
            left_out.append(name)
        print(f"DIED {name}: {reason}", flush=True)
        worker.process.kill()
        worker.end()
        worker = None
    if worker:
        worker.end()
    return left_out


def finishing(row, options):
    return "done" in row or ("died" in row and not options.again)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: tries the code, measures nothing"
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each; default: 30")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32 or float64")
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="no case is run longer than this in all"
    )
    parser.add_argument("--rows", type=Path, help="default: results/gpu_<device>.jsonl")
    parser.add_argument("--again", action="store_true", help="run cases that died again")
    parser.add_argument("--summary", type=Path, metavar="ROWS", help="only compare with the goals")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.rehearse else 30)
    unknown = [g for g in options.groups if g not in GROUPS]
    if unknown:
        parser.error(f"GROUP must be one of {', '.join(GROUPS)}, got {unknown[0]}")
    return options


def main():
    options = arguments()
    if options.worker:
        return work(options)
    if options.summary:
        return gpu_summary.report(options.summary)
    import torch

    if options.dtype not in ("bfloat16", "float16", "float32", "float64"):
        print(f"gpu_check: no dtype {options.dtype} of the kernels", file=sys.stderr)
        return 2
    results = ROOT / "benchmarks" / "results"
    if options.rehearse:
        folder = Path(tempfile.mkdtemp(prefix="gpu_rehearsal_"))
        options.rows = options.rows or folder / "rows.jsonl"
        if results in options.rows.resolve().parents:
            print("gpu_check: a rehearsal has no place among results", file=sys.stderr)
            return 2
    elif not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; try --rehearse", file=sys.stderr)
        return 2
    elif options.rows is None:
        name = torch.cuda.get_device_name(options.device).lower().replace(" ", "_")
        options.rows = results / f"gpu_{name}.jsonl"
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    names = [name for group in options.groups or GROUPS for name in cases(group, options.rehearse)]
    for name in drive(options, names):
        print(f"not run, no time left: {name}", flush=True)
    return gpu_summary.report(options.rows)


if __name__ == "__main__":
    sys.exit(main())
