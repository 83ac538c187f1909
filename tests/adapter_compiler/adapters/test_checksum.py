"""Checksums see every change, whatever the dtype and the place in memory."""

from __future__ import annotations

import random

import pytest
import torch

from adapter_compiler.adapters.parameters import checksum
from adapter_compiler.adapters.parameters.checksum import compute_checksum, format_checksum, sum_part


def sum_by_hand(data: bytes) -> str:
    """The two sums over 64-bit words."""
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    first, second = sum(words), sum(number * word for number, word in enumerate(words, 1))
    return f"{first % 2**64:016x}{second % 2**64:016x}"


def read_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


TENSORS = [
    torch.randn(5, 3),
    torch.randn(7, 3).t(),
    torch.randn(9).to(torch.bfloat16)[1:],
    torch.randint(0, 255, (13,), dtype=torch.uint8)[3:],
    torch.tensor(2.5, dtype=torch.float64),
    torch.tensor([True, False, True]),
    torch.randn(3, dtype=torch.complex64),
    torch.randn(3).to(torch.float8_e4m3fn),
    torch.empty(0, 4),
]


@pytest.mark.parametrize("words", [1, 2, 1 << 17])
@pytest.mark.parametrize("tensor", TENSORS, ids=range(len(TENSORS)))
def test_the_sums_are_those_of_the_bytes(tensor: torch.Tensor, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_WORDS", words)
    assert compute_checksum(tensor) == sum_by_hand(read_bytes(tensor))


def test_every_flipped_bit_and_exchanged_rows_are_seen() -> None:
    tensor, dice = torch.randn(40, 6), random.Random(0)
    expected = compute_checksum(tensor)
    for _ in range(200):
        data = bytearray(read_bytes(tensor))
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        assert compute_checksum(torch.frombuffer(data, dtype=torch.float32)) != expected
    for _ in range(50):
        order = torch.randperm(40)
        same = torch.equal(order, torch.arange(40))
        assert (compute_checksum(tensor[order]) == expected) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("parts", [1, 2, 3, 19, 23])
def test_sums_of_parts_add_up_to_those_of_the_whole(dtype: torch.dtype, parts: int) -> None:
    """Also where a word is cut, as shards of rows of 5 elements cut it, and where parts are empty."""
    tensor = torch.randn(19, 5).mul(50).abs().to(dtype)
    rows, sums = -(-19 // parts), [0, 0]
    for number in range(parts):
        part = tensor[number * rows : (number + 1) * rows]
        found = sum_part(part, min(number * rows, 19) * 5 * tensor.element_size())
        sums = [total + one for total, one in zip(sums, found, strict=True)]
    assert format_checksum(*sums) == compute_checksum(tensor)
