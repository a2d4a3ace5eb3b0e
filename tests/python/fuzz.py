"""Runs many cases of support/adversaries.py, of every kind in turn, and reports the faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from support.adversaries import KINDS, Failure, run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="cases in all (default 10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else list(KINDS)
    torch.set_num_threads(1)
    accepted, refused, faults = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.cases):
            kind, number = kinds[i % len(kinds)], options.first + i // len(kinds)
            try:
                taken = run_case(kind, number, Path(folder))
                (accepted if taken else refused)[kind] += 1
            except Failure as failure:
                faults.append(str(failure))
                print(failure, file=sys.stderr, flush=True)
    for kind in kinds:
        print(f"{kind}: {accepted[kind]} accepted, {refused[kind]} refused")
    print(f"{options.cases} cases in {time.monotonic() - start:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
