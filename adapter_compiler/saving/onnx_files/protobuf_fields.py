"""Walk the fields of a protobuf file without reading what is in them.

A message is a sequence of fields, each a key (number and wire type) and a payload; a message within a message
is a payload with its length in front. So the bytes of one weight are found in a file of any size by skipping
over all others, and top-level fields can be copied or left out one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED_64: 8, _FIXED_32: 4}
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """The place of one field.

    Attributes:
        number: which field of its message.
        start: offset of its key.
        begin: offset of its payload, behind the length if it has one.
        end: offset behind it.
    """

    number: int
    start: int
    begin: int
    end: int


def walk_fields(file: BinaryIO, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message from ``begin`` to ``end``.

    Raises:
        ValueError: it is cut off, or no message.
    """
    position = begin
    while position < end:
        file.seek(position)
        key, payload = _read_varint(file, position)
        kind = key & 7
        if kind == _VARINT:
            _, after = _read_varint(file, payload)
        elif kind == _LENGTH:
            length, payload = _read_varint(file, payload)
            after = payload + length
        elif kind in _FIXED_SIZES:
            after = payload + _FIXED_SIZES[kind]
        else:
            raise ValueError(f"byte {position} begins no field of a protobuf message")
        if after > end:
            raise ValueError(f"a field ends at byte {after}, its message at {end}")
        yield Field(number=key >> 3, start=position, begin=payload, end=after)
        position = after


def read_range(file: BinaryIO, begin: int, end: int) -> bytearray:
    """The bytes from ``begin`` to ``end``.

    Raises:
        ValueError: the file ends before.
    """
    data = bytearray(end - begin)
    file.seek(begin)
    if (found := file.readinto(data)) != len(data):  # type: ignore[attr-defined]
        raise ValueError(f"the file ends at byte {begin + found}, expected {end}")
    return data


def copy_range(source: BinaryIO, target: BinaryIO, begin: int, end: int) -> None:
    """Append the bytes from ``begin`` to ``end`` to ``target``, a piece at a time."""
    for position in range(begin, end, _CHUNK):
        target.write(read_range(source, position, min(end, position + _CHUNK)))


def _read_varint(file: BinaryIO, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the offset behind it, read at ``position``."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError(f"the file ends at byte {position + shift // 7}, within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value, position + shift // 7 + 1
    raise ValueError(f"byte {position} begins a number of more than ten bytes")
