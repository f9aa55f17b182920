"""Readers: one part of an input file to batches of texts. What is broken is counted with a reason.

A broken *document* becomes a `Rejection`; a broken *file* (truncated gzip, no such column, lines that are not objects)
is an `InputError`, since silently going on with half a file is how corpora shrink unnoticed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prep.config import SourceConfig, load_hook
from prep.document import Rejection
from prep.inputs.compression import CompressionError, decompressed
from prep.inputs.files import LINES_SUFFIXES, InputFile, opened
from prep.inputs.line_check import LineCounts, describe, signature
from streaming_rwkv.config import UserError

_READ_BYTES = 1 << 20
_MOST_LINE_BYTES = 1 << 28
_MOST_ARRAY_BYTES = 1 << 30
_ARRAY_RECORDS = 1 << 10  # of a JSON array at a time; the array itself is read as a whole
_BEGIN_BYTES = 60  # of a file that is something else, shown to say what it is
_ENCRYPTED_MAGIC = b"PARE"  # ends parquet with an encrypted footer, in place of PAR1
_FOOTER_LENGTH = struct.Struct("<I")  # before that
_FOOTER_READ_BYTES = 1 << 16  # as pyarrow reads: of an object the same request serves both
_SIGNATURE_BYTES = 12 + 16  # nonce and tag
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
NOT_AN_OBJECT = "not a JSON object"
TOO_LONG = f"line longer than {_MOST_LINE_BYTES >> 20} MiB"
FILTERED = "rejected by the filter"
TRANSFORMED_AWAY = "rejected by the transform"


class InputError(UserError):
    """A file, or with `on_error: stop` a document, that stops the build."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file, or a part of one that can be read by itself."""

    file: InputFile
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None  # of a parquet file
    byte_range: tuple[int, int] | None = None  # of whole lines in an uncompressed file

    @property
    def is_cut(self) -> bool:
        """True if other parts hold other lines of the file."""
        return self.byte_range not in (None, (0, self.file.size))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of one file."""

    file: InputFile
    rows: NDArray[np.int64]  # (N,) where each text stands
    texts: list[str]
    rejections: list[Rejection]
    not_objects: int = 0  # of the rejections: lines that are not JSON objects

    @property
    def line_counts(self) -> LineCounts:
        return LineCounts(len(self.texts) + len(self.rejections), self.not_objects)

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class _Broken:
    """Stands in for the text of a row that has none."""

    reason: str
    is_object: bool = False  # or may be one; does not count against the file


# Of a JSON object or a parquet row, what becomes the text.
_Select = Callable[[dict[str, Any]], Any]


def read_part(part: Part, config: SourceConfig) -> Iterator[Batch]:
    """The part's documents, in order.

    Raises:
        InputError: a file that is broken, or on which a hook fails; if the part is not cut, one that is not JSON lines.
    """
    if part.file.suffix == ".parquet":
        for rows, values in _read_parquet(part, config):
            yield _batch(part.file, rows, values, text=config.text)
    else:
        for rows, values, not_objects in _read_json(part, config):
            yield replace(_batch(part.file, rows, values, text=config.text), not_objects=not_objects)


def check_lines(file: InputFile, counts: LineCounts) -> None:
    """Check that a file that was read as JSON lines holds them, by the counts of all its lines.

    Raises:
        InputError: more than half of its lines are not JSON objects.
    """
    if counts.are_json_lines:
        return
    with opened(file) as raw:
        first, reason = _first_without_object(raw, file)
    if what := describe(counts, first=first, is_utf8=reason != INVALID_UTF8):
        raise InputError(f"{file.path}: {what}")


def _first_without_object(raw: IO[bytes], file: InputFile) -> tuple[bytes, str]:
    """Return the beginning of the first line that is not a JSON object, and the reason."""
    for lines in _lines(_blocks(raw, Part(file=file))):
        lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for line in lines:
            record = _record(line, used=None) if line and not line.isspace() else {}
            if isinstance(record, _Broken) and not record.is_object:
                return line[:_BEGIN_BYTES], record.reason
    return b"", NOT_AN_OBJECT


def without_text(config: SourceConfig) -> str:
    """Why a document is rejected that has no such key."""
    return f"no {config.text!r}"


def _batch(file: InputFile, rows: NDArray[np.int64], values: list[Any], *, text: str) -> Batch:
    if set(map(type, values)) <= {str}:
        return Batch(file=file, rows=rows, texts=values, rejections=[])
    rejections = [
        Rejection(source=file.source, file=file.name, row=row, reason=_reason(value, text))
        for row, value in zip(rows.tolist(), values, strict=True)
        if type(value) is not str
    ]
    is_text = np.fromiter((type(value) is str for value in values), np.bool_, count=len(values))
    return Batch(
        file=file, rows=rows[is_text], texts=[value for value in values if type(value) is str], rejections=rejections
    )


def _reason(value: Any, text: str) -> str:
    if isinstance(value, _Broken):
        return value.reason
    return f"{text!r} is null" if value is None else f"{text!r} is not a string"


def _has_hooks(config: SourceConfig) -> bool:
    return config.filter is not None or config.transform is not None


def _selector(config: SourceConfig) -> _Select:
    """What the hooks make of a row; without hooks, its text."""
    keep = load_hook(config.filter) if config.filter else None
    transform = load_hook(config.transform) if config.transform else None
    missing = _Broken(without_text(config))

    def select(record: dict[str, Any]) -> Any:
        if keep is not None and not keep(record):
            return _Broken(FILTERED)
        if transform is None:
            return record.get(config.text, missing)
        text = transform(record)
        return _Broken(TRANSFORMED_AWAY) if text is None else text

    return select


def _apply(select: _Select, records: Sequence[Any], *, file: InputFile, rows: NDArray[np.int64]) -> list[Any]:
    values: list[Any] = []
    for row, record in zip(rows.tolist(), records, strict=True):
        try:
            value = record if isinstance(record, _Broken) else select(record)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        # Whatever a user's hook raises, the user wants to know where: sys.exit and a Rust library's panic too.
        except BaseException as error:
            raise InputError(
                f"{file.path}: row {row}: a hook of `sources.{file.source}` raised {type(error).__name__}: {error}; "
                "mend it, or let it return False or None for such a document"
            ) from error
        if isinstance(value, str):
            value = str.__str__(value)  # of a subclass (numpy's, an HTML parser's) the plain text
            try:
                value.encode()
            except UnicodeEncodeError:
                value = _Broken(INVALID_UTF8)
        values.append(value)
    return values


# --- JSON lines, and JSON arrays in .json files ---


def _read_json(part: Part, config: SourceConfig) -> Iterator[tuple[NDArray[np.int64], list[Any], int]]:
    """(rows, their texts, lines among them that are not JSON objects)."""
    file, row = part.file, part.first_row
    select = _selector(config)
    used = None if _has_hooks(config) else config.text
    counts = LineCounts(0, 0)
    with opened(file) as raw:
        blocks = _blocks(raw, part)
        if file.suffix.startswith(".json") and not file.suffix.startswith(LINES_SUFFIXES):
            blocks, array = _whole_array(blocks, file, used=used)
            if array is not None:
                for first in range(0, len(array), _ARRAY_RECORDS):
                    items = array[first : first + _ARRAY_RECORDS]
                    rows = np.arange(first, first + len(items))
                    yield rows, _apply(select, items, file=file, rows=rows), 0
                return
        for lines in _lines(blocks):
            if row == 0:
                lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
                if what := signature(lines[0]):
                    raise InputError(f"{file.path}: no line of it is a JSON object; it is {what}")
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
                yield rows, _apply(select, records, file=file, rows=rows), not_objects
    if not part.is_cut:
        check_lines(file, counts)


def _not_objects(records: list[Any]) -> int:
    return sum(isinstance(record, _Broken) and not record.is_object for record in records)


def _texts(lines: list[bytes], text: str) -> list[Any] | None:
    """The value of each line's key `text`; None if something is broken among them."""
    if max(map(len, lines)) > _MOST_LINE_BYTES:
        return None
    try:
        return [orjson.loads(line)[text] for line in lines]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _without_blank(rows: NDArray[np.int64], lines: list[bytes]) -> tuple[NDArray[np.int64], list[bytes]]:
    is_blank = np.fromiter((not line or line.isspace() for line in lines), np.bool_, count=len(lines))
    return rows[~is_blank], [line for line, blank in zip(lines, is_blank.tolist(), strict=True) if not blank]


def _record(line: bytes, *, used: str | None) -> dict[str, Any] | _Broken:
    if len(line) > _MOST_LINE_BYTES:
        return _Broken(TOO_LONG, is_object=True)
    try:
        return _object(orjson.loads(line))
    except orjson.JSONDecodeError:
        value, reason = _loosely_parsed(line)
        return _with_text(value, used=used, reason=reason)


def _object(value: Any) -> dict[str, Any] | _Broken:
    return value if isinstance(value, dict | _Broken) else _Broken(NOT_AN_OBJECT)


def _loosely_parsed(content: bytes) -> tuple[Any, str]:
    """Parse with Python's own parser, which knows the NaN and Infinity that its `dumps` writes.

    Strings may then hold surrogates, for bytes that are not UTF-8 and for half a pair.

    Returns:
        The value, or _Broken; the reason to reject it if such a string is used.
    """
    reason = INVALID_JSON
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text, reason = content.decode(errors="surrogateescape"), INVALID_UTF8
    try:
        return json.loads(text, parse_int=_integer), reason
    except (ValueError, RecursionError):
        return _Broken(reason), reason


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return float(digits)


def _with_text(value: Any, *, used: str | None, reason: str) -> dict[str, Any] | _Broken:
    """Return the object, or _Broken if a string that is used holds surrogates.

    Args:
        used: the only key that is used; None for all of them.
    """
    record = _object(value)
    if isinstance(record, _Broken):
        return record
    checked = record if used is None else record.get(used)
    if isinstance(checked, dict if used is None else str):
        try:
            json.dumps(checked, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return _Broken(reason, is_object=reason == INVALID_JSON)
    return record


def _whole_array(
    blocks: Iterator[bytes], file: InputFile, *, used: str | None
) -> tuple[Iterator[bytes], list[Any] | None]:
    """The items of the array that the file consists of, or None and all its blocks again.

    Raises:
        InputError: it begins as an array and is none, is too long, or more than half of its items are no objects.
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
                "a whole; write one object a line (`jq -c '.[]'` does)"
            )
    content = b"".join(read).removeprefix(_BYTE_ORDER_MARK)
    try:
        array = orjson.loads(content)
        records = list(map(_object, array))
    except orjson.JSONDecodeError as error:
        array, reason = _loosely_parsed(content)
        if isinstance(array, _Broken):
            raise InputError(
                f"{file.path}: begins with '[' but is no JSON array ({error}); mend it, or write one object a line"
            ) from None
        records = [_with_text(item, used=used, reason=reason) for item in array]
    if 2 * (not_objects := _not_objects(records)) > len(records):
        raise InputError(
            f"{file.path}: {not_objects:,} of the {len(records):,} items of its array are not JSON objects; write one "
            "object for each document, or take it out of the source"
        )
    return iter(()), records


def _prepend(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _lines(blocks: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of whole lines without their newline; a very long line is joined once.

    One longer than _MOST_LINE_BYTES may come cut off, but still longer than that.
    """
    begun: list[bytes] = []
    size = 0
    for block in blocks:
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


def _blocks(raw: IO[bytes], part: Part) -> Iterator[bytes]:
    """The part's bytes, decompressed."""
    file = part.file
    if part.byte_range is not None:
        begin, end = part.byte_range
        raw.seek(begin)
        yield from _read_blocks(raw, end - begin, file)
    elif not file.compression:
        yield from _read_blocks(raw, file.size, file)
    elif file.size == 0:
        raise InputError(f"{file.path}: is empty, and not even an empty file is when compressed; download it again")
    else:
        try:
            yield from decompressed(raw, file.compression)
        except CompressionError as error:
            raise InputError(f"{file.path}: {error}; download it again") from None


def _read_blocks(raw: IO[bytes], size: int, file: InputFile) -> Iterator[bytes]:
    while size > 0:
        block = raw.read(min(size, _READ_BYTES))
        if not block:
            raise InputError(f"{file.path}: has lost {size} bytes since it was listed; is another program writing it?")
        size -= len(block)
        yield block


# --- parquet ---


def read_parquet_layout(file: InputFile, *, text: str) -> list[tuple[int, int]]:
    """(bytes of text, rows) of each row group.

    Raises:
        InputError: not a parquet file.
    """
    with opened(file) as raw, _naming(file, "cannot be read as parquet"):
        metadata = _open_parquet(raw, file).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [(_text_bytes(group, text), group.num_rows) for group in groups]


def _text_bytes(row_group: Any, text: str) -> int:
    parts = [row_group.column(index) for index in range(row_group.num_columns)]
    wanted = [part for part in parts if part.path_in_schema.partition(".")[0] == text]
    return sum(part.total_uncompressed_size for part in wanted or parts)


# Beside pyarrow's own errors its bindings raise Python's: KeyError, OverflowError, UnicodeDecodeError, …
_PYARROW_ERRORS = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, MemoryError
)  # fmt: skip


@contextlib.contextmanager
def _naming(file: InputFile, problem: str) -> Iterator[None]:
    """Turn what pyarrow raises into an error that names the file.

    Raises:
        InputError: anything but a UserError was raised.
    """
    try:
        yield
    except UserError:  # the file system's, of the file below pyarrow
        raise
    except MemoryError as error:
        raise InputError(f"{file.path}: {problem} ({_reason_of(error)}); it is damaged, or memory is short") from error
    except _PYARROW_ERRORS as error:
        raise InputError(f"{file.path}: {problem} ({_reason_of(error)}); download it again") from error


def _reason_of(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _open_parquet(raw: IO[bytes], file: InputFile) -> pq.ParquetFile:
    """The file, of which every page that carries a checksum is compared with it when it is read.

    Raises:
        InputError: not parquet, or encrypted.
    """
    raw.seek(max(0, file.size - _FOOTER_READ_BYTES))
    tail = raw.read()[-len(_ENCRYPTED_MAGIC) - _FOOTER_LENGTH.size :]
    is_encrypted = tail.endswith(_ENCRYPTED_MAGIC)
    if not is_encrypted:
        with _naming(file, "cannot be read as parquet"):
            parquet = pq.ParquetFile(raw, buffer_size=_READ_BYTES, page_checksum_verification=True)
            # A plain footer of an encrypted file is signed. Asked for an encrypted column, pyarrow aborts the process.
            signed_bytes = _FOOTER_LENGTH.unpack_from(tail)[0] - parquet.metadata.serialized_size
            is_encrypted = signed_bytes == _SIGNATURE_BYTES
    if is_encrypted:
        raise InputError(f"{file.path}: is encrypted parquet; decrypt it, or take it out of the source")
    return parquet


def _read_parquet(part: Part, config: SourceConfig) -> Iterator[tuple[NDArray[np.int64], list[Any]]]:
    file, row = part.file, part.first_row
    select, has_hooks = _selector(config), _has_hooks(config)
    with opened(file) as raw:
        parquet = _open_parquet(raw, file)
        with _naming(file, "cannot be read as parquet"):
            schema = parquet.schema_arrow
        _check_text_column(schema, file, config)
        groups = list(part.row_groups or ())
        metadata = parquet.metadata
        rows = sum(metadata.row_group(index).num_rows for index in groups)
        size = sum(_text_bytes(metadata.row_group(index), config.text) for index in groups)
        batches = parquet.iter_batches(
            batch_size=max(1, min(1 << 13, _READ_BYTES * rows // max(size, 1))),
            row_groups=groups,
            columns=None if has_hooks else [config.text],
            use_threads=False,
        )
        while True:
            with _naming(file, f"broken parquet after row {row}"):
                batch = next(batches, None)
                if batch is None:
                    return
                values = _records(batch) if has_hooks else _strings(batch.column(0))
            numbers = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            yield numbers, _apply(select, values, file=file, rows=numbers) if has_hooks else values


def _check_text_column(schema: pa.Schema, file: InputFile, config: SourceConfig) -> None:
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice and (_has_hooks(config) or config.text in twice):  # a hook's record has one value of each name
        name = config.text if config.text in twice else twice[0]
        raise InputError(
            f"{file.path}: has {schema.names.count(name)} columns {name!r}, and which one is meant cannot be told; "
            "write it with other names"
        )
    if config.transform is not None:
        return
    if config.text not in schema.names:
        raise InputError(
            f"{file.path}: no column {config.text!r}, it has {', '.join(schema.names)}; name the right one with "
            f"`sources.{file.source}.text`, or make the text with `sources.{file.source}.transform`"
        )
    kind = schema.field(config.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_string(kind) or pa.types.is_null(kind)):
        raise InputError(f"{file.path}: column {config.text!r} is of type {kind}, expected strings; name another one")


def _is_string(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _records(batch: pa.RecordBatch) -> list[Any]:
    """A dict, or _Broken if one of its strings is no UTF-8, for each row."""
    try:
        return list(batch.to_pylist())
    except _PYARROW_ERRORS:  # a value that Python cannot hold, somewhere
        columns = [[_value(value, name) for value in batch[name]] for name in batch.schema.names]
    records = (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))
    return [next((value for value in of.values() if isinstance(value, _Broken)), of) for of in records]


def _value(scalar: pa.Scalar, column: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _Broken(INVALID_UTF8)
    except _PYARROW_ERRORS as error:
        return UnreadableValue(f"column {column!r} holds a {scalar.type} that Python cannot hold ({_reason_of(error)})")


class UnreadableValue:
    """A value beside the text that Python cannot hold: a time with nanoseconds, a date beyond the year 9999.

    A hook that leaves it alone works; one that uses it raises the error that names it.
    """

    def __init__(self, problem: str) -> None:
        object.__setattr__(self, "_problem", problem)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise InputError(object.__getattribute__(self, "_problem"))

    __str__ = __repr__ = __format__ = __bool__ = __len__ = __iter__ = __int__ = __float__ = __index__ = _refuse
    __getattr__ = __getitem__ = __contains__ = __call__ = __hash__ = __setattr__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = _refuse


def _strings(column: pa.Array) -> list[Any]:
    """str, None for null, or _Broken for each row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type) or not len(column):
        return [None] * len(column)
    column = column.cast(pa.large_binary())
    # By way of buffers: to_pylist() is ten times slower, and to_numpy() imports pandas.
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(column) + 1, offset=8 * column.offset).tolist()
    content = memoryview(data or b"")
    values: list[Any]
    try:
        values = [str(content[begin:end], "utf-8") for begin, end in itertools.pairwise(bounds)]
    except UnicodeDecodeError:  # a string column need not be valid UTF-8
        values = [_decoded(content[begin:end]) for begin, end in itertools.pairwise(bounds)]
    if column.null_count:
        for row in np.nonzero(column.is_null().to_pylist())[0].tolist():
            values[row] = None
    return values


def _decoded(value: memoryview) -> str | _Broken:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return _Broken(INVALID_UTF8)
