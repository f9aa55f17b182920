"""JSON lines, and JSON arrays in .json files: one part of a file to texts or records, row by row."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from prep.config import SourceConfig
from prep.document import LineCounts
from prep.inputs.compression import CompressionError, decompressed
from prep.inputs.faults import INVALID_JSON, INVALID_UTF8, NOT_AN_OBJECT, BrokenRow, InputError, missing_text
from prep.inputs.files import LINES_SUFFIXES, InputFile, Part, opened
from prep.inputs.line_check import describe, signature

_READ_BYTES = 1 << 20
_MOST_LINE_BYTES = 1 << 28
_MOST_ARRAY_BYTES = 1 << 30
_ARRAY_RECORDS = 1 << 10  # items of a JSON array per batch; the array itself is read as a whole
_BEGIN_BYTES = 60  # of a file in another format, shown in the error
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

TOO_LONG = f"line longer than {_MOST_LINE_BYTES >> 20} MiB"


def read_json(part: Part, config: SourceConfig) -> Iterator[tuple[NDArray[np.int64], list[Any], int, int]]:
    """Read a part of a JSON file.

    Yields:
        Rows; a value for each, the text, or with hooks the whole record, or a BrokenRow; the number of lines among them
        that are not JSON objects; the bytes that were read from the file for them, compressed if it is.

    Raises:
        InputError: the file is broken, or, if the part is the whole file, is not JSON lines.
    """
    file = part.file
    used = None if config.has_hooks else config.text
    with opened(file) as raw:
        blocks = _blocks(raw, part)
        if file.suffix.startswith(".json") and not file.suffix.startswith(LINES_SUFFIXES):
            blocks, array = _whole_array(blocks, file, used=used)
            if array is not None:
                for first in range(0, len(array), _ARRAY_RECORDS):
                    items = array[first : first + _ARRAY_RECORDS]
                    size = file.size * len(items) // len(array)
                    yield np.arange(first, first + len(items)), _values(items, used=used), 0, size
                return
        begin = part.byte_range[0] if part.byte_range is not None else 0
        counts = yield from _with_bytes(_read_lines(blocks, part, used=used), raw, begin=begin)
    if not part.is_cut:
        check_lines(file, counts)


def _with_bytes(
    batches: Generator[tuple[NDArray[np.int64], list[Any], int], None, LineCounts], raw: IO[bytes], *, begin: int
) -> Generator[tuple[NDArray[np.int64], list[Any], int, int], None, LineCounts]:
    """Add to each batch the bytes by which `raw` advanced for it, and return what the generator returns."""
    while True:
        try:
            rows, values, not_objects = next(batches)
        except StopIteration as end:
            counts: LineCounts = end.value
            return counts
        at = raw.tell()
        yield rows, values, not_objects, max(0, at - begin)
        begin = max(begin, at)


def _read_lines(
    blocks: Iterator[bytes], part: Part, *, used: str | None
) -> Generator[tuple[NDArray[np.int64], list[Any], int], None, LineCounts]:
    row = part.first_row
    counts = LineCounts(0, 0)
    for lines in _lines(blocks):
        if row == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
            if what := signature(lines[0]):
                raise InputError(f"{part.file.path}: no line of it is a JSON object; it is {what}")
        rows = np.arange(row, row + len(lines))
        row += len(lines)
        texts = None if used is None else _texts(lines, used)
        if texts is not None:
            counts = counts.plus(LineCounts(len(lines), 0))
            yield rows, texts, 0
            continue
        rows, lines = _without_blank(rows, lines)
        records = [_record(line, used=used) for line in lines]
        not_objects = _not_objects(records)
        counts = counts.plus(LineCounts(len(lines), not_objects))
        if len(rows):
            yield rows, _values(records, used=used), not_objects
    return counts


def _values(records: list[Any], *, used: str | None) -> list[Any]:
    """Return the value of the key `used` of each record; the records themselves if it is None."""
    if used is None:
        return records
    missing = BrokenRow(missing_text(used))
    return [record if isinstance(record, BrokenRow) else record.get(used, missing) for record in records]


def check_lines(file: InputFile, counts: LineCounts) -> None:
    """Check that a file is JSON lines, by the counts of all its lines.

    Raises:
        InputError: more than half of its lines are not JSON objects.
    """
    if counts.are_json_lines:
        return
    with opened(file) as raw:
        first, reason = _first_without_object(raw, file)
    if what := describe(counts.lines, counts.not_objects, first=first, is_utf8=reason != INVALID_UTF8):
        raise InputError(f"{file.path}: {what}")


def _first_without_object(raw: IO[bytes], file: InputFile) -> tuple[bytes, str]:
    """Return the beginning of the first line that is not a JSON object, and the reason."""
    for lines in _lines(_blocks(raw, Part(file=file))):
        lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for line in lines:
            record = _record(line, used=None) if line and not line.isspace() else {}
            if isinstance(record, BrokenRow) and not record.is_object:
                return line[:_BEGIN_BYTES], record.reason
    return b"", NOT_AN_OBJECT


def _not_objects(records: list[Any]) -> int:
    return sum(isinstance(record, BrokenRow) and not record.is_object for record in records)


def _texts(lines: list[bytes], text: str) -> list[Any] | None:
    """Return the value of the key `text` of each line, or None if any of the lines is broken."""
    if max(map(len, lines)) > _MOST_LINE_BYTES:
        return None
    try:
        return [orjson.loads(line)[text] for line in lines]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _without_blank(rows: NDArray[np.int64], lines: list[bytes]) -> tuple[NDArray[np.int64], list[bytes]]:
    is_blank = np.fromiter((not line or line.isspace() for line in lines), np.bool_, count=len(lines))
    return rows[~is_blank], [line for line, blank in zip(lines, is_blank.tolist(), strict=True) if not blank]


def _record(line: bytes, *, used: str | None) -> dict[str, Any] | BrokenRow:
    if len(line) > _MOST_LINE_BYTES:
        return BrokenRow(TOO_LONG, is_object=True)
    try:
        return _object(orjson.loads(line))
    except orjson.JSONDecodeError:
        value, reason = _loosely_parsed(line)
        return _with_text(value, used=used, reason=reason)


def _object(value: Any) -> dict[str, Any] | BrokenRow:
    return value if isinstance(value, dict | BrokenRow) else BrokenRow(NOT_AN_OBJECT)


def _loosely_parsed(content: bytes) -> tuple[Any, str]:
    """Parse with Python's own parser, which accepts the NaN and Infinity that its `dumps` writes.

    Strings may then contain surrogates, for bytes that are not UTF-8 and for half a surrogate pair.

    Returns:
        The value, or a BrokenRow; the reason to reject it if such a string is used.
    """
    reason = INVALID_JSON
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text, reason = content.decode(errors="surrogateescape"), INVALID_UTF8
    try:
        return json.loads(text, parse_int=_integer), reason
    except (ValueError, RecursionError):
        return BrokenRow(reason), reason


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return float(digits)


def _with_text(value: Any, *, used: str | None, reason: str) -> dict[str, Any] | BrokenRow:
    """Return the object, or a BrokenRow if a string that is used contains surrogates.

    Args:
        used: the only key that is used; None for all of them.
    """
    record = _object(value)
    if isinstance(record, BrokenRow):
        return record
    checked = record if used is None else record.get(used)
    if isinstance(checked, dict if used is None else str):
        try:
            json.dumps(checked, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return BrokenRow(reason, is_object=reason == INVALID_JSON)
    return record


def _whole_array(
    blocks: Iterator[bytes], file: InputFile, *, used: str | None
) -> tuple[Iterator[bytes], list[Any] | None]:
    """Return the items of a file that is one array; for another file None, and all its blocks again.

    Raises:
        InputError: the array is malformed or too long, or more than half of its items are not objects.
    """
    first = next(blocks, b"")
    if not first.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
        return _prepend(first, blocks), None
    read, size = [first], len(first)
    for block in blocks:
        read.append(block)
        size += len(block)
        if size > _MOST_ARRAY_BYTES:
            raise InputError(
                f"{file.path}: is one JSON array of more than {_MOST_ARRAY_BYTES >> 20:,} MiB, and an array is read as "
                "a whole; write one object per line (`jq -c '.[]'` does)"
            )
    content = b"".join(read).removeprefix(_BYTE_ORDER_MARK)
    try:
        array = orjson.loads(content)
        records = list(map(_object, array))
    except orjson.JSONDecodeError as error:
        array, reason = _loosely_parsed(content)
        if isinstance(array, BrokenRow):
            raise InputError(
                f"{file.path}: begins with '[' but is not a JSON array ({error}); fix it, or write one object per line"
            ) from None
        records = [_with_text(item, used=used, reason=reason) for item in array]
    if 2 * (not_objects := _not_objects(records)) > len(records):
        raise InputError(
            f"{file.path}: {not_objects:,} of the {len(records):,} items of its array are not JSON objects; write one "
            "object for each document, or remove it from the source"
        )
    return iter(()), records


def _prepend(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _lines(blocks: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Yield lists of whole lines without their newlines; a very long line is joined once.

    A line longer than _MOST_LINE_BYTES may be cut off, but stays longer than that.
    """
    begun: list[bytes] = []
    size = 0
    for block in _pieces(blocks):
        head, newline, _ = block.partition(b"\n")
        if not newline:
            if size <= _MOST_LINE_BYTES:
                begun.append(block)
                size += len(block)
            continue
        lines = block.split(b"\n")
        lines[0] = b"".join([*begun, head])
        begun = [lines.pop()]
        size = len(begun[0])
        yield lines
    if last := b"".join(begun):
        yield [last]


def _pieces(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut large blocks: each byte may be a line, which is an object of Python."""
    for block in blocks:
        yield from (block[at : at + _READ_BYTES] for at in range(0, len(block), _READ_BYTES))


def _blocks(raw: IO[bytes], part: Part) -> Iterator[bytes]:
    """Yield the part's bytes, decompressed."""
    file = part.file
    if part.byte_range is not None:
        begin, end = part.byte_range
        raw.seek(begin)
        yield from _read_blocks(raw, end - begin, file)
    elif not file.compression:
        yield from _read_blocks(raw, file.size, file)
    elif file.size == 0:
        raise InputError(f"{file.path}: is empty, which no compressed file is; download it again")
    else:
        try:
            yield from decompressed(raw, file.compression)
        except CompressionError as error:
            raise InputError(f"{file.path}: {error}; download it again") from None


def _read_blocks(raw: IO[bytes], size: int, file: InputFile) -> Iterator[bytes]:
    while size > 0:
        block = raw.read(min(size, _READ_BYTES))
        if not block:
            raise InputError(
                f"{file.path}: is {size} bytes shorter than when it was listed; wait until "
                "no program writes to it, then run the same command again"
            )
        size -= len(block)
        yield block
