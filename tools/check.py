"""Runs the checks of headwise and adds up what passed and what failed.

    check.py BUILD test [PYTEST ARGUMENT...]   C++ tests, Python tests, the installed library
    check.py BUILD docs                        the examples and links of README.md and docs/; the
                                               site, in build/site
    check.py BUILD lint                        clang-format, ruff, mypy, tools/words.py
    check.py BUILD tidy [FILE...]              clang-tidy over the library and the bindings, or over
                                               what is compiled together with FILE; BUILD is
                                               configured
    check.py BUILD packaging                   the embedded library and a wheel
    check.py BUILD all [UNTIL]                 test and lint; and a report, which counts for
                                               nothing, of the newest and the oldest packages,
                                               ended at UNTIL (seconds since 1970)

Every runner prints its own summary; the last line is "N passed, N failed, N skipped" over all. A
check without a count of its own (lint, consumer, wheel) counts as one. Exit status 1 if any failed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPP_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
CPP_FOLDERS = ("include", "src", "python", "tests", "examples", "benchmarks")
PYTHON_FOLDERS = ("python", "tests", "examples", "benchmarks", "tools")

Count = tuple[int, int, int]  # passed, failed, skipped

# Each process of pytest has all cores for its operators, whose threads sleep while they wait.
PYTEST_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "python"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",
}


def run(*command: str | Path, **environment: str) -> bool:
    shown = [str(part) for part in command]
    print("$", *(part if len(shown) < 40 else "..." for part in shown[:8]), flush=True)
    return subprocess.run(shown, cwd=ROOT, env={**os.environ, **environment}).returncode == 0


def once(succeeded: bool) -> Count:
    return (1, 0, 0) if succeeded else (0, 1, 0)


def tool(name: str) -> str:
    """A program of the Python that runs this, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def counted(report: Path, succeeded: bool, read: Callable[[Path], Count]) -> Count:
    """The counts in a runner's report. A runner that failed without naming a failed test (it
    crashed, or found none) is one failure."""
    try:
        passed, failed, skipped = read(report)
    except (OSError, ValueError, ElementTree.ParseError):
        passed, failed, skipped = 0, 0, 0
    if failed == 0 and (not succeeded or passed == 0):
        failed = 1
    return passed, failed, skipped


def read_googletest(report: Path) -> Count:
    total = json.loads(report.read_text())
    cases = [case for suite in total["testsuites"] for case in suite["testsuite"]]
    skipped = sum(case.get("result") == "SKIPPED" for case in cases)
    failed = sum(bool(case.get("failures")) for case in cases)
    return len(cases) - failed - skipped, failed, skipped


def read_junit(report: Path) -> Count:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failed - errors - skipped, failed + errors, skipped


def check_cpp(build: Path, reports: Path) -> Count:
    report = reports / "cpp.json"
    succeeded = run(
        build / "tests/cpp/headwise_tests", "--gtest_brief=1", f"--gtest_output=json:{report}"
    )
    return counted(report, succeeded, read_googletest)


def pytest_command(python: str | Path, report: Path) -> list[str]:
    """pytest in one process per core, as far as there are 3 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = max(1, min(len(os.sched_getaffinity(0)), memory // 3_000_000_000))
    spread = ["-n", str(processes), "--dist", "loadfile", "--max-worker-restart=0"]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread]
    return [*command, f"--junitxml={report}"]


def check_python(reports: Path, arguments: list[str]) -> Count:
    report = reports / "python.xml"
    command = pytest_command(sys.executable, report)
    succeeded = run(*command, *(arguments or ["tests/python"]), **PYTEST_ENVIRONMENT)
    return counted(report, succeeded, read_junit)


def check_consumer(build: Path, way: str) -> Count:
    return once(run(ROOT / "tests/consumer/run.sh", way, build))


def check_wheel(build: Path) -> Count:
    """Builds the wheel as `pip install ./python` does, and imports it from elsewhere. Without
    optimisation, because only the packaging is tested."""
    wheels, site = build / "wheel", build / "wheel-site"
    for folder in (wheels, site):
        shutil.rmtree(folder, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    succeeded = run(
        *(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT / "python"),
        f"-Cbuild-dir={build / 'wheel-build'}",
        "-Ccmake.define.HEADWISE_CUDA=OFF",
        "-Ccmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0",
    ) and run(*pip, "install", "--no-deps", "--target", site, *sorted(wheels.glob("*.whl")))
    if succeeded:
        code = (
            "import headwise, os; assert headwise.__file__.startswith(os.environ['PYTHONPATH']), "
            "headwise.__file__; print('wheel: headwise', headwise.__version__)"
        )
        succeeded = run(sys.executable, "-c", code, PYTHONPATH=str(site))
    return once(succeeded)


def check_format() -> Count:
    sources = [
        str(path.relative_to(ROOT))
        for folder in CPP_FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in CPP_SUFFIXES
    ]
    return once(run(tool("clang-format"), "--dry-run", "-Werror", *sources))


def gcc_headers(command: str) -> str:
    """The folder of omp.h, which clang-tidy lacks; it has the other headers itself."""
    compiler = next(part for part in shlex.split(command) if not part.endswith("ccache"))
    asked = (compiler, "-print-file-name=include")
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def tidy_units(build: Path, files: list[str]) -> list[dict[str, str]]:
    """The commands that compile the library and the bindings, or ``files`` of theirs: where sources
    are compiled together, clang-tidy reads them together, since LibTorch's headers, which it would
    read for each again, are most of its time."""
    wanted = {str((ROOT / name).resolve()) for name in files}
    units = []
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        output = os.path.relpath(Path(entry["directory"], entry["output"]), build)
        if not output.startswith(("src/", "python/bindings/")) or "pch" in source.name:
            continue
        if source.suffix not in (".cpp", ".cxx"):
            continue  # a kernel, for nvcc
        together = re.findall(r'#include "(/.*)"', source.read_text())
        if not wanted or wanted & {str(source), *together}:
            # Without g++'s precompiled headers: every source includes what it uses.
            command = re.sub(r"-Winvalid-pch|-include \S*cmake_pch\S*", "", entry["command"])
            command += f" -idirafter {gcc_headers(command)}"
            units.append({**entry, "command": command})
    return units


def check_tidy(build: Path, files: list[str]) -> Count:
    units = tidy_units(build, files)
    if not units and not files:
        return once(False)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        Path(folder, "compile_commands.json").write_text(json.dumps(units))

        def check(unit: dict[str, str]) -> bool:
            command = (tool("clang-tidy"), "-p", folder, "--quiet", unit["file"])
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout, done.stderr, sep="", flush=True)
            return done.returncode == 0

        clean = list(pool.map(check, units))
    return sum(clean), len(clean) - sum(clean), 0


def check_ruff(*command: str) -> Count:
    folders = [folder for folder in PYTHON_FOLDERS if (ROOT / folder).is_dir()]
    return once(run(tool("ruff"), *command, *folders))


def checks(
    build: Path, what: str, arguments: list[str], reports: Path
) -> Iterator[tuple[str, Count]]:
    if what in ("lint", "all"):
        yield "clang-format", check_format()
        yield "ruff check", check_ruff("check")
        yield "ruff format", check_ruff("format", "--check")
        yield "words", once(run(sys.executable, "tools/words.py"))
        yield "types", once(run(tool("mypy"), "--python-executable", sys.executable))
    if what == "tidy":
        yield "clang-tidy", check_tidy(build, arguments)
    if what in ("test", "all"):
        yield "C++ tests", check_cpp(build, reports)
        yield "installed library", check_consumer(build, "find_package")
        yield "Python tests", check_python(reports, arguments if what == "test" else [])
    if what == "all":
        run(sys.executable, ROOT / "tools/versions.py", build, *arguments)
    if what == "docs":
        yield "documentation", check_python(reports, ["tests/python/docs/test_docs.py"])
        yield "site", once(run(tool("mkdocs"), "build", "--strict", NO_MKDOCS_2_WARNING="1"))
    if what == "packaging":
        yield "embedded library, without CUDA", check_consumer(build, "add_subdirectory")
        yield "wheel", check_wheel(build)


def main() -> int:
    build, what, arguments = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:]
    results = []
    with tempfile.TemporaryDirectory() as reports:
        for result in checks(build, what, arguments, Path(reports)):
            results.append(result)
    print()
    for name, (passed, failed, skipped) in results:
        print(f"{name:32} {'FAILED' if failed else 'ok':6}  {passed}, {failed}, {skipped}")
    passed, failed, skipped = (sum(count[i] for _, count in results) for i in range(3))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
