"""Unfinished work: finished parts survive, and nothing else is mistaken for them."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from headwise.io.store import Store, file_in, locked, short_name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KEY = {"model": "ab", "seed": 0}
STEPS = {"a": [0.1, None], "b/ü\x1b": {"x": "\u2028"}, "c": 1e300}


def filled(path, key=KEY) -> Store:
    store = Store(path, "work", key)
    for name, value in STEPS.items():
        store.add(name, value)
    return store


def kept(path) -> dict:
    store = Store(path, "work", KEY)
    return {name: store.get(name) for name in STEPS if store.get(name) is not None}


def test_steps_are_found_again(tmp_path):
    path = tmp_path / "steps"
    assert kept(path) == {} and len(Store(path, "work", KEY)) == 0
    assert filled(path).path == path and kept(path) == STEPS
    Store(path, "work", KEY).add("a", 7)
    assert Store(path, "work", KEY).get("a") == 7
    assert filled(None).get("c") == 1e300  # nothing is kept, but it is there
    with pytest.raises(ValueError, match="not JSON compliant"):
        filled(path).add("d", float("nan"))
    assert kept(path) == STEPS


@pytest.mark.parametrize(
    ("work", "key", "message"),
    [
        ("other", KEY, "is of work 'work', not 'other': give another file"),
        ("work", {"model": "cd", "seed": 0}, "is of work with model='ab', not 'cd': remove it or"),
        ("work", {"model": "ab"}, "is of work with seed=0, not None"),
        ("work", {**KEY, "x": "y" * 5000}, "is of work with x=None, not 'yyy.*'…: remove it"),
    ],
)
def test_other_work_is_refused_and_left_alone(tmp_path, work, key, message):
    path = tmp_path / "steps"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as refused:
        Store(path, work, key)
    assert len(str(refused.value)) < 500 and path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello", b"{}\n", b"[1]\n", b"\xff\n", b"[" * 10**5 + b"\n"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "a\x1b"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a file of unfinished work") as refused:
        Store(path, "work", KEY)
    assert "\x1b" not in str(refused.value) and path.read_bytes() == content


def test_every_cut_leaves_the_steps_before_it(tmp_path):
    """A full disk, or a machine that stopped, cuts a file anywhere."""
    path = tmp_path / "steps"
    filled(path)
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        finished = sum(end < cut for end in ends[1:])
        # The end of a line may be all that is missing of it.
        missing_end = cut in ends[1:]
        assert list(kept(path)) == list(STEPS)[: finished + missing_end]
        store = Store(path, "work", KEY)
        store.add("later", 1)
        assert Store(path, "work", KEY).get("later") == 1
        assert list(kept(path)) == list(STEPS)[: finished + missing_end]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_foreign_lines_are_not_taken_for_steps(tmp_path, data):
    """Records of another step in a step's place, {}, lists, NaN, deep nesting, garbage."""
    path = tmp_path / "steps"
    path.unlink(missing_ok=True)
    filled(path)
    lines = path.read_bytes().split(b"\n")[1:-1]
    name, value, check = json.loads(lines[0])
    foreign = st.sampled_from(
        [
            json.dumps(["c", value, check]).encode(),
            json.dumps([name, {"accuracy": 1.0}, check]).encode(),
            json.dumps([name, value]).encode(),
            b"{}", b"[]", b"null", b'["a", NaN, "x"]', b"[" * 5000, b"\xff\xfe", b"",
        ]
    ) | st.binary(max_size=40)  # fmt: skip
    with open(path, "ab") as file:
        file.write(data.draw(foreign) + b"\n")
    assert kept(path) == STEPS


def test_a_full_disk(tmp_path, monkeypatch):
    """What was finished before it is there afterwards, in this process and the next."""
    path = tmp_path / "steps"
    store = filled(path)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > len(before):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:9])

    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **_: Full(path, "r+"))
    with pytest.raises(OSError, match="No space left"):
        store.add("d", [1] * 100)
    monkeypatch.setattr("builtins.open", real)
    assert path.read_bytes() == before and store.get("d") is None
    store.add("d", 2)
    assert kept(path) == STEPS and Store(path, "work", KEY).get("d") == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 2), torch.randn(2, 2).bfloat16(), torch.zeros(0, 4, dtype=torch.int32),
        torch.tensor(True), torch.randn(4, 3, dtype=torch.float64).T, torch.arange(5),
    ],
)  # fmt: skip
def test_tensors(tmp_path, tensor):
    path, calls = tmp_path / "steps", []

    def compute():
        calls.append(1)
        return {"x": tensor}

    for _ in range(2):
        found = Store(path, "work", KEY).tensors("part", compute)["x"]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert calls == [1]
    assert torch.equal(Store(None, "work", {}).tensors("part", compute)["x"], tensor)


def test_work_of_another_key_has_another_file(tmp_path):
    first = Store.in_folder(tmp_path / "new", "work", KEY)
    first.add("a", 1)
    other = Store.in_folder(tmp_path / "new", "work", {**KEY, "seed": 1})
    assert other.get("a") is None and first.path.exists()
    assert Store.in_folder(tmp_path / "new", "work", KEY).get("a") == 1
    (tmp_path / "new" / "work-mine.jsonl").touch()
    neighbour = Store.in_folder(tmp_path / "new", "work-2", KEY)
    Store.in_folder(tmp_path / "new", "work", {"x": 1}, only=True)
    assert not first.path.exists() and not other.path.exists() and neighbour.path.exists()
    assert (tmp_path / "new" / "work-mine.jsonl").exists()
    neighbour.path.write_text("{}\n")
    assert Store.in_folder(tmp_path / "new", "work-2", KEY).get("a") is None
    assert Store.in_folder(None, "work", KEY).path is None


@settings(max_examples=200)
@given(st.text(max_size=300), st.text(max_size=300))
def test_short_names(first, second):
    for name in (first, second):
        short = short_name(name)
        assert len(short.encode("utf-8", "surrogatepass")) <= 80
        assert "/" not in short and "\0" not in short
    assert (short_name(first) == short_name(second)) == (first == second)


def test_long_names_become_files(tmp_path):
    name = "ä" * 235
    assert file_in(tmp_path, name, KEY).name.startswith("äää")
    filled_store = Store.in_folder(tmp_path, name, KEY)
    filled_store.add("a", 1)
    assert Store.in_folder(tmp_path, name, KEY).get("a") == 1


HOLD = """
import sys, time
from headwise.io.store import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new"
    package = Path(sys.modules["headwise"].__path__[0])
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="another run is using the folder '.*new': wait"):
            with locked(folder):
                pass
    finally:
        other.kill()  # the lock ends with its process
        other.wait()
    with locked(folder), pytest.raises(RuntimeError, match="another run is using"):
        with locked(folder):
            pass
    with locked(folder), locked(None), locked(tmp_path):
        pass
