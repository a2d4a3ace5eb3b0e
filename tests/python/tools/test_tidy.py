"""Which commands `make tidy` gives clang-tidy."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tidy_units():
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tidy_units


@pytest.fixture
def build(tmp_path):
    """A build of two sources together, one alone, a precompiled header, a kernel and a test."""
    sources = {
        "unity_0.cxx": f'#include "{ROOT}/src/trace.cpp"\n#include "{ROOT}/src/files.cpp"\n',
        "alone.cpp": "",
        "cmake_pch.hxx.cxx": "",
        "kernel.cu": "",
    }
    entries = []
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
        # Ninja writes outputs relative to the build or not, by the version of CMake.
        entries.append(
            (tmp_path / name, f"{tmp_path if name == 'alone.cpp' else '.'}/src/{name}.o")
        )
    entries.append((tmp_path / "alone.cpp", "tests/cpp/alone.cpp.o"))
    command = "c++ -Winvalid-pch -include /build/cmake_pch.hxx -O3 -c"
    commands = [
        {"file": str(file), "output": output, "command": command, "directory": str(tmp_path)}
        for file, output in entries
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(commands))
    return tmp_path


def names(units):
    return [Path(unit["file"]).name for unit in units]


def test_every_source_of_the_library_once(tidy_units, build):
    units = tidy_units(build, [])
    assert names(units) == ["unity_0.cxx", "alone.cpp"]
    for unit in units:
        *command, option, folder = unit["command"].split()
        assert command == ["c++", "-O3", "-c"] and option == "-idirafter" and Path(folder).is_dir()


def test_only_what_is_compiled_with_a_file(tidy_units, build):
    assert names(tidy_units(build, ["src/files.cpp"])) == ["unity_0.cxx"]
    assert names(tidy_units(build, ["src/trace.cpp", str(build / "alone.cpp")])) == [
        "unity_0.cxx",
        "alone.cpp",
    ]
    assert tidy_units(build, ["src/model.cpp"]) == []
