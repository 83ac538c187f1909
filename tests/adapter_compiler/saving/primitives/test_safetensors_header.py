"""Headers are compared with the file before anything is allocated; what safetensors reads is read the same."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapter_compiler.errors import CheckpointError, ExportError
from adapter_compiler.saving.primitives.safetensors_dtypes import DTYPE_NAMES
from adapter_compiler.saving.primitives.safetensors_header import read_safetensors
from tests.adapter_compiler.saving.same_bits import assert_same_bits

TENSORS = {
    "w": torch.randn(3, 4),
    "half": torch.randn(5).to(torch.bfloat16),
    "none": torch.empty(0, 3),
    "one": torch.tensor(7),
    "flags": torch.tensor([True, False]),
}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def describe(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def test_tensors_of_every_dtype_come_back(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    for dtype in DTYPE_NAMES:
        bits = torch.randint(0, 2, (4, dtype.itemsize), dtype=torch.uint8)
        tensors[str(dtype)] = bits.reshape(-1).view(dtype)
    tensors.pop("torch.float8_e8m0fnu")  # which not every version of safetensors writes
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "a")
    assert found.metadata == {"format": "pt"}
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert_same_bits(dict(sorted(found.read_all().items())), dict(sorted(tensors.items())))


DAMAGES: dict[str, tuple[Any, bytes, str]] = {
    "no object": ([], b"", "its header does not begin with '{'"),
    "no JSON": (b"{xxxxxxx", b"", "this is not JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is {'a': 1}, expected text by key"),
    "no entry": ({"w": 3}, b"", "tensor w is 3, expected an object"),
    "a key too many": (describe(more=1), bytes(8), "tensor w: the key 'more' is unknown"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "tensor w: the key 'data_offsets' is missing"),
    "dtype": (describe("F33"), bytes(8), "tensor w: dtype is 'F33', expected one of F64, F32,"),
    "dtype that is none": (describe(["F32"]), bytes(8), r"tensor w: dtype is \['F32'\], expected one of"),
    "negative size": (
        describe(shape=[-2]),
        bytes(8),
        r"tensor w: shape is \[-2\], expected a list of at most 64 sizes",
    ),
    "fraction": (describe(shape=[2.0]), bytes(8), r"tensor w: shape is \[2.0\], expected a list of"),
    "true": (describe(shape=[True]), bytes(4), r"tensor w: shape is \[True\], expected a list of"),
    "huge": (describe(shape=[2**40, 2**40]), bytes(8), "tensor w: shape is .*, expected a list of"),
    "huge beside nothing": (describe(shape=[0, 2**40, 2**40], offsets=[0, 0]), b"", "tensor w: shape is"),
    "dimensions": (describe(shape=[1] * 65, offsets=[0, 4]), bytes(4), "tensor w: shape is"),
    "size": (describe(shape=[3]), bytes(8), r"tensor w of dtype F32 and shape \[3\] has 8 bytes, expected 12"),
    "half a byte": (describe("F4", shape=[3], offsets=[0, 1]), b"x", r"has 1 bytes, expected 1\.5"),
    "backwards": (describe(offsets=[8, 0]), bytes(8), r"tensor w: data_offsets is \[8, 0\], expected \[begin, end\]"),
    "negative offset": (describe(offsets=[-8, 0]), bytes(8), r"data_offsets is \[-8, 0\], expected"),
    "behind the end": (describe(offsets=[0, 2**62]), bytes(8), "has 4611686018427387904 bytes, expected 8"),
    "cut": (describe(), bytes(7), r"it has \d+ bytes, its header describes \d+, expected as many"),
    "more": (describe(), bytes(9), r"it has \d+ bytes, its header describes \d+, expected as many"),
    "gap": (
        describe(offsets=[1, 9]),
        bytes(9),
        r"tensor w begins at \d+ and leaves a gap behind the one before, expect",
    ),
    "overlap": (
        {**describe(), "v": describe(offsets=[4, 12])["w"]},
        bytes(12),
        r"tensor v begins at \d+ and overlaps the one before, expected \d+",
    ),
    "the same bytes": ({**describe(), "v": describe()["w"]}, bytes(8), "overlaps the one before"),
    "twice": (b'{"w": 1, "w": 2}', b"", "the key 'w' appears twice in one object"),
    "half a character": (b'{"\\ud800": {}}', b"", "the name of a tensor is"),
    "deep": (b'{"w": ' + b"[" * 200 + b"]" * 200 + b"}", b"", "nested more than 100 levels deep"),
    "very deep": (b'{"w": ' + b"[" * 100_000, b"", "this is not JSON .RecursionError"),
    "long number": (b'{"w": ' + b"1" * 5000 + b"}", b"", "this is not JSON .ValueError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_is_refused_with_the_file_and_the_tensor(damage: str, tmp_path: Path) -> None:
    header, data, message = DAMAGES[damage]
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path} cannot be read as a safetensors file: ")
    assert str(caught.value).endswith("; fetch or save it again")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes, expected at least 8"),
        (b"\0" * 7, "it has 7 bytes, expected at least 8"),
        (b"\0" * 8, "its header would have 0 bytes, expected 2 to 0"),
        (b"\xff" * 16, "its header would have 18,446,744,073,709,551,615 bytes, expected 2 to 8"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "its header would have 1,099,511,627,776 bytes, expected 2 to 2"),
    ],
    ids=range(5),
)
def test_lengths_are_compared_with_the_file(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path / "a")


def write_huge_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write((1 << 39).to_bytes(8, "little") + b"{")
        file.truncate(1 << 40)


def write_many_values(path: Path) -> None:
    write(path, b'{"w": [' + b"[]," * 3_000_000 + b"1]}")


def write_huge_tensor(path: Path) -> None:
    write(path, describe(shape=[1 << 40], offsets=[0, 1 << 42]), bytes(8))


@pytest.mark.parametrize("make", [write_huge_header, write_many_values, write_huge_tensor])
def test_nothing_is_allocated_that_the_file_only_claims(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / "a")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_a_dtype_that_torch_lacks_is_refused_only_when_it_is_read(tmp_path: Path) -> None:
    file = read_safetensors(write(tmp_path / "a", describe("F4", shape=[4], offsets=[0, 2]), b"xx"))
    assert file.tensors["w"].dtype is None
    with pytest.raises(CheckpointError, match="tensor w is F4, which torch does not have"):
        file.read("w")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", describe(), bytes(8))
    file = read_safetensors(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="tensor w ends after 5 of its 8 bytes"):
        file.read("w")


def test_flags_are_0_or_1(tmp_path: Path) -> None:
    path = write(tmp_path / "a", describe("BOOL", offsets=[0, 2]), b"\x01\x02")
    with pytest.raises(CheckpointError, match="tensor w of dtype BOOL has other bytes than 0 and 1"):
        read_safetensors(path).read("w")


def test_the_error_is_that_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="this file does not exist"):
        read_safetensors(tmp_path / "none", error=ExportError)


SIZES = st.lists(st.integers(0, 3), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "U64"]),
        "shape": SIZES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)


@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.integers(0, 40), is_laid_out=st.booleans()
)
def test_whatever_is_read_safetensors_reads_the_same(
    header: dict[str, Any], size: int, is_laid_out: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And what it refuses is refused."""
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    if is_laid_out:
        bits, position = {"F32": 32, "F16": 16, "I8": 8, "BOOL": 8, "U64": 64}, 0
        for entry in header.values():
            length = bits[entry["dtype"]]
            for one in entry["shape"]:
                length *= one
            entry["data_offsets"], position = [position, position + length // 8], position + length // 8
        size = position
    write(path, header, bytes(size))
    try:
        expected = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        expected = None
    try:
        found = read_safetensors(path).read_all()
    except CheckpointError:
        found = None
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))
