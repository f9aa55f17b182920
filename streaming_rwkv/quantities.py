"""Large numbers in settings: `32k` tokens, `200gb` of disk; every setting that takes them is read by this parser."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_QUANTITY = re.compile(r"([+-]?\d[\d_,]*(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def read_count(value: Any) -> Any:
    """Return the number that a text such as `32k`, `1.5M` or `2B` means, in powers of 1,000.

    Raises:
        ValueError: another unit, or not a whole number.
    """
    return _read(value, _count_unit, "a whole number, or one with k, M, G (or B) or T in powers of 1,000, such as 32k")


def read_bytes(value: Any) -> Any:
    """Return the number of bytes that a text such as `200gb` or `72MiB` means, in powers of 1,024.

    Raises:
        ValueError: another unit, or not a whole number.
    """
    return _read(
        value, _bytes_unit, "a number of bytes, or one with kb, mb, gb or tb in powers of 1,024, such as 200gb"
    )


def _read(value: Any, unit_of: Any, expected: str) -> Any:
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value.strip())
    unit = unit_of(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"found {value!r}; expected {expected}")
    number = Decimal(re.sub("[_,]", "", match[1])) * unit
    if number != int(number):
        raise ValueError(f"found {value!r}; expected {expected}")
    return int(number)


def _count_unit(unit: str) -> int | None:
    return _THOUSANDS.get(unit)


def _bytes_unit(unit: str) -> int | None:
    power = _BYTES.get(unit.removesuffix("b").removesuffix("i"))
    return None if power is None or unit in ("i", "ib") else 1024**power


# Bounds that no run reaches, so that no number overflows what counts with it: 64-bit integers, `poll` and threads.
MOST_NUMBER = 2**31 - 1
MOST_TOKENS = 10**15
MOST_BYTES = 2**60
MOST_SECONDS = 7 * 24 * 3600

PositiveInt = Annotated[int, Field(gt=0, le=MOST_NUMBER)]
Count = Annotated[int, BeforeValidator(read_count), Field(le=MOST_TOKENS)]
PositiveCount = Annotated[int, BeforeValidator(read_count), Field(gt=0, le=MOST_TOKENS)]
NonNegativeCount = Annotated[int, BeforeValidator(read_count), Field(ge=0, le=MOST_TOKENS)]
ByteCount = Annotated[int, BeforeValidator(read_bytes), Field(le=MOST_BYTES)]
LoaderWorkers = Annotated[int, Field(ge=0, le=128)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
