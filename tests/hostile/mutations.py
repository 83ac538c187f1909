"""Ways to damage a file: bytes, JSON, the header of a safetensors file, and the header of ours inside it."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

#: Values that have their own ways to be mistaken for something else.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**62, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "0", "1e3", "NaN", "a\0b", "\ud800", "x" * 300),
    *("../out", "/etc/passwd", "C:\\out", "..\\out", "a/../../out", ".", "nan", "svd", "lora-offset1", "dora"),
    *("lora-offset" + "9" * 5000, "__tensor__", "adapters.0.weight.P", "F32", "F64", "I8", "F4", "BOOL", "U64"),
    *([], {}, [0], [1, 2], [-1, 1], [2**62, 2**62], [[1]], {"__tensor__": 3}, {"__tuple__": 1}, {"__items__": [1]}),
    *({"__tensor__": "a", "__tuple__": []}, {"a": None}, [None] * 70, "1" * 5000),
)

LENGTH = 8


def find_places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in nested lists and dicts, the value itself first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, one in items for place in find_places(one, (*above, key)))]


def look_up(value: Any, place: tuple[Any, ...]) -> Any:
    """What stands at a place."""
    for key in place:
        value = value[key]
    return value


def change_value(value: Any, dice: Random) -> Any:
    """The value with one change at a place drawn by chance."""
    value = copy.deepcopy(value)
    places = find_places(value)
    place = dice.choice(places)
    other = dice.choice(ODD) if dice.random() < 0.6 else look_up(value, dice.choice(places))
    other = copy.deepcopy(other)
    if not place:
        return other
    holder, key = look_up(value, place[:-1]), place[-1]
    action = dice.choice(("replace", "replace", "nudge", "remove", "add", "rename", "nest"))
    if action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, list):
        holder.append(other)
    elif action == "add":
        holder[other if isinstance(other, str) else str(other)[:50]] = copy.deepcopy(holder[key])
    elif action == "rename" and isinstance(holder, dict):
        holder[dice.choice(("", "x", "weight", "0.weight", "__metadata__", str(key) + "x"))] = holder.pop(key)
    elif action == "nest":
        for _ in range(dice.choice((1, 5, 150))):
            holder[key] = [holder[key]]
    elif action == "nudge" and type(holder[key]) in (int, float):
        holder[key] += dice.choice((-1, 1, 8, -8, 0.5))
    else:
        holder[key] = other
    return value


def write_text(value: Any, dice: Random) -> bytes:
    """A value as JSON text, which now and then is damaged itself."""
    text = json.dumps(value).encode()
    kind = dice.random()
    if kind < 0.05:
        return damage_bytes(text, dice)
    if kind < 0.1:
        return text.replace(b"{", b'{"version": 1, "version": 1, ', 1)
    if kind < 0.12:
        return text.replace(b": ", b": " + b"[" * 20_000, 1)
    return text.decode().encode("utf-16") if kind < 0.13 else text


def damage_bytes(data: bytes, dice: Random) -> bytes:
    """Flipped bits, and bytes that are cut off, removed, doubled or put in."""
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        place = dice.randrange(len(damaged) + 1)
        action = dice.random()
        if action < 0.6 and place < len(damaged):
            damaged[place] ^= 1 << dice.randrange(8)
        elif action < 0.7:
            del damaged[place:]
        elif action < 0.8:
            del damaged[place : place + dice.randrange(20)]
        elif action < 0.9:
            damaged[place:place] = damaged[place : place + dice.randrange(40)]
        else:
            damaged[place:place] = bytes(dice.randrange(256) for _ in range(dice.randrange(9)))
    return bytes(damaged)


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    return json.loads(data[LENGTH:end]), data[end:]


def join_safetensors(text: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    return len(text).to_bytes(LENGTH, "little") + text + data


def damage_safetensors(data: bytes, dice: Random) -> bytes:
    """Bytes, the file's header, or the header of ours in it; that one with checksums and without."""
    kind = dice.random()
    if kind < 0.25:
        return damage_bytes(data, dice)
    if kind < 0.3:
        return dice.choice((0, 1, 2**32, 2**63, 2**64 - 1, len(data))).to_bytes(LENGTH, "little") + data[LENGTH:]
    header, values = split_safetensors(data)
    own = header.get("__metadata__", {}).get("adapter_compiler")
    if own is None or kind < 0.5:
        return join_safetensors(write_text(change_value(header, dice), dice), values)
    inner = json.loads(own)
    if dice.random() < 0.9:
        for key in ("checksum", "tensors"):
            inner.pop(key, None)
    inner = change_value(inner, dice)
    text = write_text(inner, dice).decode("utf-8", "surrogateescape")
    header["__metadata__"]["adapter_compiler"] = text.encode("utf-8", "replace").decode()
    return join_safetensors(json.dumps(header).encode(), values)


def damage_json(data: bytes, dice: Random) -> bytes:
    """Bytes, or the value that they stand for."""
    if dice.random() < 0.2:
        return damage_bytes(data, dice)
    value = json.loads(data)
    for _ in range(dice.choice((1, 1, 2))):
        value = change_value(value, dice)
    return write_text(value, dice)
