"""safetensors files: against the reference package, and against files that mean harm."""

import contextlib
import json
import os
import resource
import struct
import time

import pytest
import safetensors.torch
import torch
from headwise.io.files import write_atomic, write_json
from headwise.io.safetensors_files import (
    load_safetensors,
    read_safetensors_metadata,
    save_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype if dtype.is_complex else torch.float32).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def many() -> dict[str, torch.Tensor]:
    tensors = {f"a.{dtype}": draw(dtype, 3, 5) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "view": torch.randn(4, 6).t()[1:, ::2],
        "naïve 名": torch.ones(1),
    }


def test_the_reference_package_reads_what_we_write(tmp_path):
    tensors, path = many(), tmp_path / "w.safetensors"
    save_safetensors(path, tensors, {"format": "pt"})
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_reference_package_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in many().items()}
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(tensors, path, {"a": "b"})
    read = load_safetensors(path)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    assert read_safetensors_metadata(path) == {"a": "b"}


def test_float8_e8m0_and_conjugate_views_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    scale = torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e8m0fnu)
    z = torch.randn(3, dtype=torch.complex64)
    save_safetensors(path, {"scale": scale, "conj": z.conj()})
    read = load_safetensors(path)
    assert same(read["scale"], scale)
    assert torch.equal(read["conj"], torch.conj_physical(z))


def test_float4_round_trips(tmp_path):
    # Two numbers of 4 bits share a byte; the file counts numbers, torch bytes.
    path = tmp_path / "w.safetensors"
    values = torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2)
    save_safetensors(path, {"a": values})
    read = load_safetensors(path)["a"]
    assert read.dtype == torch.float4_e2m1fn_x2 and read.shape == (2, 4)
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_slice("a").get_shape() == [2, 8]
        assert file.get_slice("a").get_dtype() == "F4"
    header = safetensors.torch.save({"a": values})[8:]
    assert header[: header.index(b"}")] == path.read_bytes()[8:][: header.index(b"}")]


#: Seconds of a processor after which reading a header has hung.
HANGS = 30.0


def header_of(entries: int, size: int = 4, step: int = 4) -> bytes:
    return json.dumps(
        {
            f"tensor.{i:06d}": {
                "dtype": "F32",
                "shape": [size // 4],
                "data_offsets": [i * step, i * step + size],
            }
            for i in range(entries)
        }
    ).encode()


@pytest.mark.parametrize(("step", "accepted"), [(4, True), (0, False)])
def test_headers_are_read_in_linear_time(tmp_path, step, accepted):
    path, entries = tmp_path / "w", 200_000
    path.write_bytes(file_bytes(header_of(entries, step=step), b"\0" * (4 * entries)))
    start = time.process_time()
    if accepted:
        assert len(load_safetensors(path)) == entries
    else:
        with pytest.raises(ValueError, match="must not overlap"):
            load_safetensors(path)
    assert time.process_time() - start < HANGS  # seconds; quadratic: more than a minute


def test_many_tensors_are_written_in_linear_time(tmp_path):
    start = time.process_time()
    save_safetensors(tmp_path / "w", {f"t{i}": torch.zeros(1) for i in range(20_000)})
    assert time.process_time() - start < HANGS


def test_no_tensors(tmp_path):
    save_safetensors(tmp_path / "w", {})
    assert load_safetensors(tmp_path / "w") == {}
    assert safetensors.torch.load_file(tmp_path / "w") == {}


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ({"a": torch.ones(2, dtype=torch.complex128)}, TypeError, "must have a dtype that"),
        ({"a": torch.ones(2).to_sparse()}, TypeError, "must be dense, got layout Sparse"),
        ({"a": torch.ones(2, device="meta")}, ValueError, "must have data, got a meta tensor"),
        ({"__metadata__": torch.ones(2)}, ValueError, 'not be named "__metadata__"'),
        ({"a\0b": torch.ones(2)}, ValueError, r'"a\\u0000b" must not have a NUL character'),
        ({"a": [1.0]}, TypeError, "tensors must map names to tensors, got list at 'a'"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, error, text):
    with pytest.raises(error, match=text):
        save_safetensors(tmp_path / "w", tensors)
    assert os.listdir(tmp_path) == []


def file_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


EIGHT = b"\0" * 8
HOSTILE = {
    "empty file": (b"", "is truncated: a safetensors file begins with 8 bytes"),
    "five bytes": (b"\1\2\3\4\5", "is truncated"),
    "header past the end": (file_bytes(b"{}", length=3), "ends past the end of the file"),
    "header of 2^64 - 1": (file_bytes(b"{}", length=2**64 - 1), "of at most 100000000 bytes"),
    "no header": (file_bytes(b""), "is not valid JSON"),
    "not an object": (file_bytes(b"[]"), "must be a JSON object, got array"),
    "NUL after the object": (file_bytes(b"{}\0\0"), "must not hold a byte of value 0"),
    "text after the object": (file_bytes(b"{}{}"), "is not valid JSON"),
    "not JSON": (file_bytes(b'{"a": '), "is not valid JSON: parse error at line 1, column"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "is not valid JSON: .*UTF-8"),
    "nested": (file_bytes(b'{"a":' + b"[" * 100000), "not be nested deeper than 3"),
    "key twice": (
        file_bytes(json.dumps(one()).encode()[:-1] + b"," + json.dumps(one()).encode()[1:], EIGHT),
        'has the key "a" twice',
    ),
    "inner key twice": (file_bytes(b'{"a":{"dtype":"F32","dtype":"F32"}}'), '"dtype" twice'),
    "unknown key": (file_bytes(one(extra=1), EIGHT), 'has an unknown key "extra"'),
    "missing key": (file_bytes({"a": {"dtype": "F32", "shape": []}}), 'the key "data_offsets"'),
    "entry not an object": (file_bytes({"a": 3}), "must be a JSON object, got number"),
    "dtype unknown": (file_bytes(one("F5"), EIGHT), 'has the dtype "F5", which torch does not'),
    "F4 odd": (file_bytes(one("F4", (1, 3), (0, 2)), b"12"), "end with an even size"),
    "F4 scalar": (file_bytes(one("F4", (), (0, 1)), b"1"), "end with an even size"),
    "dtype a number": (file_bytes(one(1), EIGHT), '"dtype" of .* must be a string, got number'),
    "negative shape": (file_bytes(one(shape=(-2,)), EIGHT), "must not be negative, got -2"),
    "fraction in shape": (file_bytes(one(shape=(2.0,)), EIGHT), "must be integers, got 2.0"),
    "shape overflows": (file_bytes(one(shape=(2**62, 2**62)), EIGHT), "fewer than 2\\^63 bytes"),
    "empty shape overflows": (file_bytes(one(shape=(0, 2**62, 2**62))), "fewer than 2\\^63 bytes"),
    "shape over 63 bits": (file_bytes(one(shape=(2**63,)), EIGHT), "must fit 63 bits"),
    "65 dimensions": (file_bytes(one(shape=(1,) * 65)), "at most 64 dimensions, got 65"),
    "three offsets": (file_bytes(one(offsets=(0, 4, 8)), EIGHT), "two integers, got 3 elements"),
    "descending": (file_bytes(one(offsets=(8, 0)), EIGHT), r"must ascend, got \[8, 0\]"),
    "past the end": (file_bytes(one(), b"\0" * 7), "must end within the 7 bytes of data"),
    "negative offset": (file_bytes(one(offsets=(-8, 0)), EIGHT), "must not be negative, got -8"),
    "wrong size": (file_bytes(one(shape=(1,)), EIGHT), "must span the 4 bytes .*, got 8"),
    "overlap": (
        file_bytes(one() | {"b": one(offsets=(4, 12))["a"]}, b"\0" * 12),
        'tensor "b" .* must not overlap the one before it',
    ),
    "same place twice": (file_bytes(one() | {"b": one()["a"]}, EIGHT), "must not overlap"),
    "hole": (file_bytes(one(offsets=(4, 12)), b"\0" * 12), "must begin where the one before"),
    "data after the last": (file_bytes(one(), b"\0" * 9), "must end with its last tensor"),
    "NUL in a name": (
        file_bytes({"a\0": one()["a"]}, EIGHT),
        r'"a\\u0000" .* must not have a NUL character',
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "must hold strings"),
    "metadata a list": (file_bytes({"__metadata__": []}), "must be a JSON object, got array"),
    "bool of two": (file_bytes(one("BOOL", (2,), (0, 2)), b"\1\2"), "must have only 0 and 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_one_sentence(tmp_path, name):
    content, text = HOSTILE[name]
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as error:
        load_safetensors(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


#: What we refuse and the reference takes: a reader must not be able to see another model in a file
#: than the next one, or something that no name shows.
STRICTER = {
    "a key twice": one(),  # filled in below: JSON has no such object in Python
    "an unknown key": one(extra=1),
    "an entry as a list": {"a": ["F32", [2], [0, 8]]},
    "a NUL in a name": {"a\0": one()["a"]},
    "a bool of two": one("BOOL", (8,), (0, 8)),
}


@pytest.mark.parametrize("name", STRICTER)
def test_what_only_we_refuse(tmp_path, name):
    text = json.dumps(STRICTER[name])
    if name == "a key twice":
        text = text[:-1] + "," + text[1:]
    content = file_bytes(text.encode(), b"\1\2\3\4\5\6\7\0" if "bool" in name else EIGHT)
    safetensors.torch.load(content)
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match=r"twice|unknown key|JSON object|NUL|only 0 and 1"):
        load_safetensors(tmp_path / "w")


@pytest.mark.parametrize(
    "text", [b" {}", b"\n\t{}\r ", b'{"__metadata__": null}', b"{}" + b" " * 99]
)
def test_white_space_is_taken_as_the_reference_takes_it(tmp_path, text):
    content = file_bytes(text)
    assert safetensors.torch.load(content) == {}
    (tmp_path / "w").write_bytes(content)
    assert load_safetensors(tmp_path / "w") == {}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "w"
    save_safetensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bool)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-[]{}",:'))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        tensors = load_safetensors(path)
    except ValueError:
        return
    # What was accepted fills the file exactly, as the reference package requires too.
    length = struct.unpack("<Q", content[:8])[0]
    assert sum(t.nbytes for t in tensors.values()) == path.stat().st_size - 8 - length


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        load_safetensors(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        load_safetensors(tmp_path / "pipe")


@contextlib.contextmanager
def small_disk():
    """No file of this process may grow past 4 kB, as if the disk were full. No fixture: pytest
    reports before it takes fixtures down, and its own output may be such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    weights, text = tmp_path / "w.safetensors", tmp_path / "t.json"
    save_safetensors(weights, {"a": torch.ones(3)})
    write_json(text, {"a": 1})
    for write in (
        lambda: save_safetensors(weights, {"a": torch.ones(10000)}),
        lambda: write_atomic(text, "x" * 10000),
        lambda: write_atomic(tmp_path / "new", b"x" * 10000),
    ):
        with pytest.raises(OSError, match="File too large"), small_disk():
            write()
    assert sorted(os.listdir(tmp_path)) == ["t.json", "w.safetensors"]
    assert torch.equal(load_safetensors(weights)["a"], torch.ones(3))
    assert json.loads(text.read_text()) == {"a": 1}


def test_write_atomic(tmp_path):
    path, link = tmp_path / "real", tmp_path / "link"
    write_atomic(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    path.chmod(0o640)
    link.symlink_to(path)
    write_atomic(link, b"two")
    assert link.is_symlink() and path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "such", "x")
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path, "x")
    with pytest.raises(ValueError, match="path must not be empty"):
        write_atomic("", "x")
    with pytest.raises(OSError, match="No space left"):
        write_atomic("/dev/full", "x")
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, float("nan"))
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
