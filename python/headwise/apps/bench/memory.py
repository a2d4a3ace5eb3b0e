"""Peak memory of a call, measured in a separate process.

The process returns freed memory to the system at once, runs the call once to warm up, resets the
system's record of its peak, and runs the call again: the difference between the record and the
resting size is the peak of the call, scratch memory inside libraries included. Linux only
(``/proc/self/clear_refs``).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

#: The C library and MKL keep freed memory for later, which could hide a peak.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MKL_DISABLE_FAST_MM": "1",
}


def measurable() -> bool:
    """Whether this system keeps a record of a process's peak that can be reset."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def peaks(what: str, names: Sequence[str], **arguments) -> dict[str, dict[str, int]]:
    """For each contender, ``call_bytes``: peak above the resting size, outputs included.

    Args:
        what: ``"layer"`` or ``"entropy"``: which contenders of this package.
        names: contenders.
        arguments: of the contenders, as JSON values.

    Raises:
        RuntimeError: the process that measures failed.
    """
    task = json.dumps({"what": what, "names": list(names), **arguments})
    environment = {**os.environ, **GIVE_BACK, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "headwise.apps.bench.memory_process", task],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"measuring memory failed: {lines[-1]}")
    return json.loads(done.stdout)


def call_bytes(run: Callable[[], object]) -> int:
    """Peak memory of the second of two calls, above what the process held before it."""
    run()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    resting = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - resting)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
