"""Parquet files: row groups to texts or records, row by row."""

from __future__ import annotations

import contextlib
import itertools
import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prep.config import SourceConfig
from prep.inputs.faults import INVALID_UTF8, BrokenRow, InputError
from prep.inputs.files import InputFile, Part, opened
from streaming_rwkv.config import UserError

_READ_BYTES = 1 << 20
_READ_EXPANDED_BYTES = 1 << 27  # of strings that rows share in the file, when each has its copy
_MOST_TEXT_BYTES = 1 << 28  # as for a line of JSON
TOO_LONG = f"text longer than {_MOST_TEXT_BYTES >> 20} MiB"
_DICTIONARY_HEADER = re.compile(rb"\x15\x04\x15([\x80-\xff]*[\x00-\x7f])", re.DOTALL)
_HEADER_BYTES = 3 + 5
_ENCRYPTED_MAGIC = b"PARE"  # ends a file with an encrypted footer, in place of PAR1
_FOOTER_LENGTH = struct.Struct("<I")  # before the magic bytes
_FOOTER_READ_BYTES = 1 << 16  # as much as pyarrow reads, so that one request to S3 serves both
_SIGNATURE_BYTES = 12 + 16  # nonce and tag


def read_parquet_layout(file: InputFile, config: SourceConfig) -> list[tuple[int, int]]:
    """Return (bytes of text, rows) of each row group.

    Raises:
        InputError: the file is not parquet, or has no such column.
    """
    with opened(file) as raw, _naming(file, "cannot be read as parquet"):
        parquet = _open_parquet(raw, file)
        metadata = parquet.metadata
        _check_text_column(parquet.schema_arrow, file, config)  # before hours are spent on the sources before it
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [(_text_bytes(group, config.text), group.num_rows) for group in groups]


def read_parquet(part: Part, config: SourceConfig) -> Iterator[tuple[NDArray[np.int64], list[Any], int]]:
    """Read row groups of a parquet file.

    Yields:
        Rows; a value for each, the text, or with hooks the whole record, or a BrokenRow; about their bytes of text.

    Raises:
        InputError: the file is broken, or has no such column.
    """
    file, row = part.file, part.first_row
    with opened(file) as raw:
        parquet = _open_parquet(raw, file)
        with _naming(file, "cannot be read as parquet"):
            schema = parquet.schema_arrow
        _check_text_column(schema, file, config)
        groups = list(part.row_groups or ())
        metadata = parquet.metadata
        rows = sum(metadata.row_group(index).num_rows for index in groups)
        size = sum(_text_bytes(metadata.row_group(index), config.text) for index in groups)
        for index in groups:
            with _naming(file, f"broken parquet after row {row}"):
                most_rows = _READ_EXPANDED_BYTES // max(1, _longest_repeated(raw, metadata.row_group(index)))
            batches = parquet.iter_batches(
                batch_size=max(1, min(1 << 13, _READ_BYTES * rows // max(size, 1), most_rows)),
                row_groups=[index],
                columns=None if config.has_hooks else [config.text],
                use_threads=False,
            )
            while True:
                with _naming(file, f"broken parquet after row {row}"):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    values = _values(batch, has_hooks=config.has_hooks)
                numbers = np.arange(row, row + batch.num_rows)
                row += batch.num_rows
                yield numbers, values, size * batch.num_rows // rows
        if row != part.first_row + rows:  # a damaged footer: pyarrow reads a column without metadata as empty
            raise InputError(
                f"{file.path}: broken parquet after row {row} (of {part.first_row + rows} that its footer promises); "
                "download it again"
            )


def _values(batch: pa.RecordBatch, *, has_hooks: bool) -> list[Any]:
    """Return the text or the record of each row, or a BrokenRow for one with a text that is too long."""
    if batch.nbytes <= _MOST_TEXT_BYTES:
        return _records(batch) if has_hooks else _strings(batch.column(0))
    rows = (_without_dictionaries(batch.slice(row, 1)) for row in range(batch.num_rows))
    return [
        BrokenRow(TOO_LONG) if row.nbytes > _MOST_TEXT_BYTES else _values(row, has_hooks=has_hooks)[0] for row in rows
    ]


def _without_dictionaries(row: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row with the values of its dictionaries that it has, and not all others."""
    columns = [x.dictionary_decode() if pa.types.is_dictionary(x.type) else x for x in row.columns]
    return pa.RecordBatch.from_arrays(columns, names=row.schema.names)


def _longest_repeated(raw: IO[bytes], row_group: Any) -> int:
    """Return a bound of the bytes of values that take next to none for each row: every one may be that long.

    Those are the values of a dictionary, and the beginnings that a value shares with the one before it. pyarrow does
    not tell the size of a dictionary, so the header of the column's first page is read: a struct of Thrift's compact
    protocol that begins with the page's type and its size, each as a field header and a zigzag varint. Where that page
    is no dictionary, one may come later; the bound is then the column.
    """
    largest = 0
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        if column.physical_type != "BYTE_ARRAY":
            continue
        raw.seek(column.dictionary_page_offset or column.data_page_offset)
        header = _DICTIONARY_HEADER.match(raw.read(_HEADER_BYTES))
        if header and "DELTA_BYTE_ARRAY" not in column.encodings:
            size = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(header[1])) >> 1
        else:
            size = column.total_uncompressed_size
        largest = max(largest, size)
    return largest


def _text_bytes(row_group: Any, text: str) -> int:
    parts = [row_group.column(index) for index in range(row_group.num_columns)]
    wanted = [part for part in parts if part.path_in_schema.partition(".")[0] == text]
    return sum(part.total_uncompressed_size for part in wanted or parts)


# Besides pyarrow's own errors its bindings raise Python's: KeyError, OverflowError, UnicodeDecodeError, …
_PYARROW_ERRORS = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, MemoryError
)  # fmt: skip


@contextlib.contextmanager
def _naming(file: InputFile, problem: str) -> Iterator[None]:
    """Turn an error of pyarrow into one that names the file.

    Raises:
        InputError: pyarrow raised an error.
    """
    try:
        yield
    except UserError:  # of the file below pyarrow
        raise
    except MemoryError as error:
        raise InputError(
            f"{file.path}: {problem} ({_reason_of(error)}); it is damaged, or memory is exhausted"
        ) from error
    except _PYARROW_ERRORS as error:
        raise InputError(f"{file.path}: {problem} ({_reason_of(error)}); download it again") from error


def _reason_of(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _open_parquet(raw: IO[bytes], file: InputFile) -> pq.ParquetFile:
    """Open a parquet file; pages that have a checksum are verified when they are read.

    Raises:
        InputError: the file is not parquet, or is encrypted.
    """
    raw.seek(max(0, file.size - _FOOTER_READ_BYTES))
    tail = raw.read()[-len(_ENCRYPTED_MAGIC) - _FOOTER_LENGTH.size :]
    is_encrypted = tail.endswith(_ENCRYPTED_MAGIC)
    if not is_encrypted:
        with _naming(file, "cannot be read as parquet"):
            parquet = pq.ParquetFile(raw, buffer_size=_READ_BYTES, page_checksum_verification=True)
            # An encrypted file may have a plain but signed footer. Reading its encrypted columns, pyarrow aborts.
            signed_bytes = _FOOTER_LENGTH.unpack_from(tail)[0] - parquet.metadata.serialized_size
            is_encrypted = signed_bytes == _SIGNATURE_BYTES
    if is_encrypted:
        raise InputError(f"{file.path}: is encrypted parquet; decrypt it, or remove it from the source")
    return parquet


def _check_text_column(schema: pa.Schema, file: InputFile, config: SourceConfig) -> None:
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice and (config.has_hooks or config.text in twice):  # a hook's record has one value per name
        name = config.text if config.text in twice else twice[0]
        raise InputError(
            f"{file.path}: has {schema.names.count(name)} columns {name!r}, which is ambiguous; rename them"
        )
    if not config.needs_text:
        return
    if config.text not in schema.names:
        raise InputError(
            f"{file.path}: no column {config.text!r}, found {', '.join(schema.names)}; name the right one with "
            f"`sources.{file.source}.text`, or make the text with `sources.{file.source}.transform`"
        )
    kind = schema.field(config.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_string(kind) or pa.types.is_null(kind)):
        raise InputError(
            f"{file.path}: column {config.text!r} is of type {kind}, expected strings; name another column"
        )


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
    """Return a dict for each row, or a BrokenRow if one of its strings is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except _PYARROW_ERRORS:  # one of the values has no Python equivalent
        columns = [[_value(value, name) for value in batch[name]] for name in batch.schema.names]
    records = (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))
    return [next((value for value in of.values() if isinstance(value, BrokenRow)), of) for of in records]


def _value(scalar: pa.Scalar, column: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return BrokenRow(INVALID_UTF8)
    except _PYARROW_ERRORS as error:
        return UnreadableValue(
            f"column {column!r} has a {scalar.type} that Python cannot represent ({_reason_of(error)})"
        )


class UnreadableValue:
    """A value that Python cannot represent: a time with nanoseconds, a date after the year 9999.

    A hook that uses the value raises an error that names its column; other hooks are not affected.
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
    """Return a str, None for null, or a BrokenRow, for each row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type) or not len(column):
        return [None] * len(column)
    column = column.cast(pa.large_binary())
    # Through buffers: to_pylist() is ten times slower, and to_numpy() imports pandas.
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


def _decoded(value: memoryview) -> str | BrokenRow:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return BrokenRow(INVALID_UTF8)
