"""Reports how the Python tests fare with the newest and the oldest packages that headwise allows.

    versions.py BUILD [UNTIL]

The packages are those at both ends of the ranges in python/pyproject.toml and requirements/dev.in,
but torch is that of the Python that runs this: BUILD was compiled for it. (`make test-newest` and
`make test-oldest` take torch and the build's tools from those ends too, and compile.) Only the test
files that name transformers, numpy or hypothesis run. An end whose packages are those of the Python
that runs this is not run again, and nothing runs after UNTIL (seconds since 1970). This is a
report, not a check: the exit status is 0 whatever the result, so that a new release of a package
does not stop any work.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from check import PYTEST_ENVIRONMENT, ROOT, pytest_command

RANGES = ("python/pyproject.toml", "requirements/dev.in")
ENDS = {"newest": "highest", "oldest": "lowest-direct"}
SHOWN = ("transformers", "numpy", "safetensors", "hypothesis", "pytest")
TOUCHING = re.compile(r"\b(transformers|numpy|hypothesis)\b")
MOST_NAMES = 20
LEAST_SECONDS = 120


def resolve(end: str) -> dict[str, str]:
    """Package -> version at one end of the ranges, with the torch that is installed here."""
    uv = Path(sys.executable).with_name("uv")
    command = [
        *(uv, "pip", "compile", "--quiet", "--all-extras", "--no-header", "--no-annotate"),
        *("--no-emit-index-url", "--only-binary", ":all:", "--resolution", ENDS[end]),
        *("--python", sys.executable, *RANGES, "-"),
    ]
    pinned = f"torch=={version('torch').split('+')[0]}\n"
    lines = subprocess.run(
        command, cwd=ROOT, input=pinned, text=True, check=True, capture_output=True, timeout=300
    ).stdout.splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def prepare(folder: Path, packages: dict[str, str]) -> Path:
    """The Python of a virtual environment with ``packages``: those that the Python at hand has in
    another version are installed, and the rest, torch among them, is that Python's own."""
    venv.create(folder, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (beside,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"{beside}\n")
    data = Path(sys.prefix) / "share" / "headwise"  # texts that no package installs
    if data.is_dir():
        (folder / "share").mkdir(exist_ok=True)
        (folder / "share" / "headwise").symlink_to(data.resolve())
    others = [f"{name}=={own}" for name, own in packages.items() if installed(name) != own]
    if others:
        uv = Path(sys.executable).with_name("uv")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", python, *others]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return python


def test_files() -> list[str]:
    files = sorted((ROOT / "tests/python").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if TOUCHING.search(file.read_text())]


def test(python: Path, report: Path, seconds: float | None) -> str:
    """A summary of the tests: the counts, and the names of those that failed."""
    command = pytest_command(python, report)
    environment = {**os.environ, **PYTEST_ENVIRONMENT}
    report.unlink(missing_ok=True)
    log = report.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *test_files()],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"not finished within {seconds:.0f} s (see {log})"
    if not report.exists():
        return f"pytest ended with status {process.returncode} (see {log})"
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    wrong = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if not wrong:
        return f"all {len(cases)} tests hold"
    more = [f"and {len(wrong) - MOST_NAMES} more"] if len(wrong) > MOST_NAMES else []
    names = "".join(f"\n    {name}" for name in (*wrong[:MOST_NAMES], *more))
    return f"{len(wrong)} of {len(cases)} tests do not hold:{names}"


def main() -> int:
    build = Path(sys.argv[1]).resolve()
    until = float(sys.argv[2]) if len(sys.argv) > 2 else None
    for end in ENDS:
        seconds = None if until is None else until - time.time()
        if seconds is not None and seconds < LEAST_SECONDS:
            print(f"{end}: not tried, for want of time", flush=True)
            continue
        try:
            packages = resolve(end)
            print(f"{end}: {', '.join(f'{name} {packages[name]}' for name in SHOWN)}", flush=True)
            if all(installed(name) == packages[name] for name in SHOWN):
                print(f"{end}: as tested above", flush=True)
                continue
            python = prepare(build / f"python-{end}", packages)
            print(f"{end}: {test(python, build / f'python-{end}.xml', seconds)}", flush=True)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            said = getattr(error, "stderr", None) or str(error)
            print(f"{end}: could not be tried: {' '.join(str(said).split())[:500]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
