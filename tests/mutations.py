"""Mutations of valid files: of each field of plain values, and of bytes. A seed always gives the same mutation."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_DEEP = "nested too deeply"
_INFINITE = "an infinite number"
_LONG = "a number of many digits"
_RAW = {_DEEP: "[" * 50_000 + "]" * 50_000, _INFINITE: "1e999", _LONG: "1" + "0" * 5_000}

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 256, 65_535, 65_536, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 64) + 1,
    -(1 << 63), 0.5, -0.0, 1e308, 5e-324, float("nan"), "", " ", "x", "0", "-1", "1e9", "\0", "\ud800", "\x1b[2J", ".",
    "..", "../../etc/passwd", "/dev/zero", "/", "é" * 200, "x" * 5_000, "${oc.env:HOME}", "${", "s3://a:b@c/d", "~",
    [], {}, [None], [[]], {"": None}, {"x": 1}, [0, 1], _DEEP, _INFINITE, _LONG,
]  # fmt: skip


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Return a copy of a plain value in which one to three places have another type, sign, size, depth or name."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        container, key = rng.choice(_places(root))
        _mutate_place(root, container, key, rng)
        if not root:
            root = [None]
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return each (container, key) within nested lists and mappings."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], list | dict):
            found += _places(value[key])
    return found


def _mutate_place(root: list[Any], container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    match rng.randrange(8):
        case 0 | 1 | 2:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        case 3:
            container[key] = _changed(value, rng)
        case 4 if container is not root:
            del container[key]
        case 5 if isinstance(container, dict):
            container[rng.choice((f"{key}x", "", "x", str(key).upper(), "\ud800"))] = container.pop(key)
        case 5 if container is not root:
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(rng.choice(container)))
        case 6:
            container[key] = [value] if rng.random() < 0.5 else {"x": value}
        case _:
            other, at = rng.choice(_places(root))  # another field's value
            container[key] = copy.deepcopy(other[at])


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice(
            [-value, value + 1, value - 1, value * 2, value * 1_000_003, str(value), value + 0.5, [value]]
        )
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        more = rng.choice(["\0", "\n", "/", "\\", "\ud800", "床", "é", "\x7f", "x" * 300])
        return rng.choice(
            [value[:at], value * 2, value.upper(), value[:at] + more + value[at:], value[::-1], len(value)]
        )
    return rng.choice([value * 2, value[::-1], []]) if isinstance(value, list) else list(value)


def as_json(value: Any) -> str:
    """Return JSON, in which numbers may be infinite and lists nested more deeply than Python can write them."""
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """Return the JSON of a mutated value, at times in another encoding or with damaged bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutated_bytes(as_json(value).encode(), rng)
    content = as_json(mutated_value(value, rng))
    if kind == 1:
        encoding = rng.choice(["utf-16", "utf-8-sig", "utf-32-be", "latin-1"])
        return content.encode(encoding, errors="replace")
    return content.encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes of which some are flipped, overwritten, cut off, removed, repeated, or taken from elsewhere."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(data)
        at, length = rng.randrange(size + 1), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        match rng.randrange(9):
            case 0 if size:
                data[at % size] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"0", b'"', b"\n")) * len(data[at : at + length])
            case 5:
                start = rng.randrange(size + 1)
                data[at : at + length] = data[start : start + length]
            case 6:
                number = rng.choice((0, 1, 2, 127, 255, 256, 65_535, 1 << 31, (1 << 32) - 1, size, at))
                width = rng.choice((1, 2, 4, 8))
                data[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 7:
                data += data[at : at + length]
            case _:
                data[at : at + 4] = rng.randbytes(4)
    return bytes(data)
