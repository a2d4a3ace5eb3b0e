"""What explaining costs: selections recorded during a forward, and a report on a data set.

    python benchmarks/explain_cost.py --model tuned --data reviews.csv --threads 2 --json cost.json

Runs on a model that `headwise compare --keep-models` or `headwise.save` wrote, beside its texts.
The report is the command `headwise explain --data`, run in a process of its own: its wall-clock and
CPU time and its peak resident memory are printed, and those of a report on fewer texts, which show
what grows with them. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import headwise as hw
import torch
from headwise.apps.tasks.models import load_tokenizer, load_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".csv")
    parser.add_argument("--text-column", default="text", metavar="COLUMN")
    parser.add_argument("--texts", type=int, nargs="+", default=[250, 2000], metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="of each forward")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = {
        "torch": torch.__version__,
        "trace": measure_trace(options),
        "threads": options.threads,
        "reports": [measure_report(options, texts) for texts in options.texts],
    }
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure_trace(options: argparse.Namespace, sequences: int = 16) -> dict:
    """Forwards without a trace and in ``hw.trace``, alternating, in CPU time of one thread; and the
    overhead of a layer without a trace: it checks whether its list of observers is empty."""
    torch.set_num_threads(1)
    with options.data.open(encoding="utf-8", newline="") as file:
        texts = [row[options.text_column] for row in csv.DictReader(file)][:sequences]
    model, tokenizer = load_trained(options.model).eval(), load_tokenizer(options.model)
    batch = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    def forward() -> float:
        begin = time.process_time()
        model(**batch)
        return time.process_time() - begin

    def traced() -> float:
        with hw.trace(model):
            return forward()

    ways = (forward, traced, forward)
    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for _ in range(5):
            forward(), traced()
        for turn in range(options.rounds):
            order = list(range(len(ways)))
            random.Random(turn).shuffle(order)
            for way in order:
                times[way].append(ways[way]())
    off, on, again = times
    layers = list(hw.attention_layers(model).values())
    looks = timeit.timeit(lambda: [bool(layer._observers) for layer in layers], number=10_000)
    median = statistics.median(off)
    return {
        "sequences": len(texts),
        "tokens": int(batch["input_ids"].size(1)),
        "forward_ms": round(1e3 * median, 3),
        "selections_on": compared(off, on),
        "same_again": compared(off, again),
        "off_share": float(f"{looks / 10_000 / median:.2g}"),
    }


def compared(first: list[float], second: list[float]) -> dict[str, float]:
    """How much longer ``second`` takes: of the medians, with a 95% interval by bootstrap."""
    draw = random.Random(0)
    rows = range(len(first))
    ratios = []
    for _ in range(2000):
        some = draw.choices(rows, k=len(first))
        a, b = ([times[row] for row in some] for times in (first, second))
        ratios.append(statistics.median(b) / statistics.median(a) - 1)
    ratios.sort()
    share = statistics.median(second) / statistics.median(first) - 1
    return {"share": round(share, 4), "low": round(ratios[50], 4), "high": round(ratios[1949], 4)}


def measure_report(options: argparse.Namespace, texts: int) -> dict:
    """``headwise explain --data`` on this many texts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "headwise", "explain", "--model", options.model, "--data",
            options.data, "--text-column", options.text_column, "--limit", texts, "--threads",
            options.threads, "--out", folder, "--format", "html",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        if status != 0:
            raise SystemExit(f"explain_cost: headwise explain failed on {texts} texts")
        document = json.loads((Path(folder) / "use.json").read_text(encoding="utf-8"))
    faithful = document["faithfulness"]
    return {
        "texts": document["data"]["texts"],
        "tokens_mean": document["data"]["tokens_mean"],
        "wall_s": round(wall, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "faithfulness": faithful and {key: faithful[key] for key in ("area", "low", "high")},
    }


if __name__ == "__main__":
    main()
