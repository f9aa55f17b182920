"""RWKV-LM's `.bin/.idx` files (Megatron's MMapIndexedDataset): documents of token ids, back to texts.

    x.idx    magic · version u64 · type u8 · N u64 · D u64 · sizes i32[N] · pointers i64[N] · documents i64[D]
    x.bin    the ids of all N items, one after another

Numbers are little-endian. `documents` has the item with which each document begins, and the number of items at its end:
RWKV-LM's tools write one item for each document, ended by eos.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from prep.inputs.faults import INVALID_UTF8, BrokenRow, InputError
from prep.inputs.files import InputFile, Part, opened
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES: dict[int, Any] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ITEMS_PER_BLOCK = 1 << 16
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1 << 10
_MOST_DOCUMENT_BYTES = 1 << 28
_REMEDY = "copy both files again, or write them again from the texts"

TOO_LONG_IDS = f"ids of more than {_MOST_DOCUMENT_BYTES >> 20} MiB"
END_WITHIN = "ids have bos or eos inside"
WITHOUT_TEXT = "ids without text"


class _Index:
    """The header of an open `.idx`, and blocks of its arrays."""

    def __init__(self, stream: IO[bytes], file: InputFile) -> None:
        self._stream, self._file = stream, file
        header = stream.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise self.error(f"begins with {header[: len(_MAGIC)]!r}, expected {_MAGIC!r}: it is no index of RWKV-LM's")
        if len(header) < _HEADER.size:
            raise self.error(f"has {len(header)} bytes, its header has {_HEADER.size}; {_REMEDY}")
        _, version, code, self.items, documents = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            raise self.error(
                f"is of version {version} with ids of type {code}, expected version 1 and an integer type "
                f"({', '.join(map(str, _TYPES))})"
            )
        self.dtype = np.dtype(_TYPES[code])
        expected = _HEADER.size + 12 * self.items + 8 * documents
        if file.size != expected:
            raise self.error(
                f"has {file.size:,} bytes, but its header names {self.items:,} items and {documents:,} "
                f"documents, which take {expected:,}; {_REMEDY}"
            )
        if documents != self.items + 1:
            raise self.error(
                f"has {self.items:,} items in {documents - 1:,} documents, expected one item for each; write "
                "it without dividing documents into sentences"
            )

    def error(self, problem: str) -> InputError:
        return InputError(f"{self._file.path}: {problem}")

    def sizes(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the number of ids of each item."""
        return self._array(_HEADER.size + 4 * first, "<i4", count)

    def pointers(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the first byte of each item in the `.bin`."""
        return self._array(_HEADER.size + 4 * self.items + 8 * first, "<i8", count)

    def first_items(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the item with which each document begins."""
        return self._array(_HEADER.size + 12 * self.items + 8 * first, "<i8", count)

    def _array(self, offset: int, dtype: str, count: int) -> NDArray[np.int64]:
        size = count * np.dtype(dtype).itemsize
        self._stream.seek(offset)
        content = self._stream.read(size)
        if len(content) != size:
            raise self.error(f"ends within an array; {_REMEDY}")
        return np.frombuffer(content, dtype).astype(np.int64)


def read_ids_layout(index: InputFile, ids: InputFile, *, unit_bytes: int) -> list[tuple[int, int, int]]:
    """Check an `.idx` as a whole and divide its documents: (first row, rows, bytes) of about `unit_bytes` each.

    Raises:
        InputError: the index is damaged, or does not fit the `.bin`.
    """
    with opened(index) as stream:
        layout = _Index(stream, index)
        parts: list[tuple[int, int, int]] = []
        first_row = begin = at = 0
        for first in range(0, layout.items, _ITEMS_PER_BLOCK):
            count = min(_ITEMS_PER_BLOCK, layout.items - first)
            sizes = layout.sizes(first, count)
            if (sizes < 0).any():
                raise layout.error(f"item {first + int(np.argmax(sizes < 0))} has a negative size; {_REMEDY}")
            ends = at + np.cumsum(sizes * layout.dtype.itemsize)
            if not np.array_equal(layout.pointers(first, count), np.concatenate([[at], ends[:-1]])):
                raise layout.error(
                    f"an item from {first} on does not begin where the one before it ends; {_REMEDY}"
                )  # no tool writes such a file
            if not np.array_equal(layout.first_items(first, count), np.arange(first, first + count)):
                raise layout.error(f"a document from {first} on is not one item; {_REMEDY}")
            row = 0
            while (row := int(np.searchsorted(ends, begin + unit_bytes))) < count and int(ends[row]) > begin:
                parts.append((first_row, first + row + 1 - first_row, int(ends[row]) - begin))
                first_row, begin = first + row + 1, int(ends[row])
            at = int(ends[-1])
        if layout.first_items(layout.items, 1)[0] != layout.items:
            raise layout.error(f"the end of its documents is not that of its items; {_REMEDY}")
        if first_row < layout.items:
            parts.append((first_row, layout.items - first_row, at - begin))
    if at != ids.size:
        raise InputError(f"{ids.path}: has {ids.size:,} bytes, {index.path} names {at:,}; {_REMEDY}")
    return parts


@lru_cache(maxsize=8)
def named_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer that a source names for its ids, once per process.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    return load_tokenizer(name)


def read_ids(part: Part, tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.int64], list[str | BrokenRow]]]:
    """Read the documents of a part: rows, and the text of each, or a BrokenRow.

    Raises:
        InputError: a file is damaged, or an id is not in the tokenizer's vocabulary.
    """
    assert part.ids is not None
    assert part.rows is not None
    with opened(part.file) as index_stream, opened(part.ids) as stream:
        index = _Index(index_stream, part.file)
        end = part.first_row + part.rows
        if part.rows:
            stream.seek(int(index.pointers(part.first_row, 1)[0]))
        texts: list[str | BrokenRow] = []
        first, held = part.first_row, 0
        for begin in range(part.first_row, end, _ITEMS_PER_BLOCK):
            for count in index.sizes(begin, min(_ITEMS_PER_BLOCK, end - begin)).tolist():
                size = count * index.dtype.itemsize
                if size > _MOST_DOCUMENT_BYTES:
                    stream.seek(stream.tell() + size)
                    texts.append(BrokenRow(TOO_LONG_IDS))
                else:
                    content = stream.read(size)
                    if len(content) != size:
                        raise InputError(f"{part.ids.path}: row {first + len(texts)}: ends within it; {_REMEDY}")
                    ids = np.frombuffer(content, index.dtype)
                    texts.append(_text(ids, tokenizer, part.ids, row=first + len(texts)))
                    held += size
                if held >= _BATCH_BYTES or len(texts) == _BATCH_DOCUMENTS:
                    yield np.arange(first, first + len(texts)), texts
                    first, texts, held = first + len(texts), [], 0
        if texts:
            yield np.arange(first, first + len(texts)), texts


def _text(ids: NDArray[Any], tokenizer: Tokenizer, file: InputFile, *, row: int) -> str | BrokenRow:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
        raise InputError(
            f"{file.path}: row {row}: the id {wrong} is not in the vocabulary of {tokenizer.name!r} "
            f"({tokenizer.vocab_size:,} ids); name the tokenizer that made the ids with "
            f"`sources.{file.source}.tokenizer`"
        )
    if len(ids) and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    if len(ids) and ids[0] == tokenizer.bos_id != tokenizer.eos_id:
        ids = ids[1:]
    if ((ids == tokenizer.eos_id) | (ids == tokenizer.bos_id)).any():
        return BrokenRow(END_WITHIN)
    if not tokenizer.token_bytes[ids].all():
        return BrokenRow(WITHOUT_TEXT)
    text = tokenizer.decode(ids.tolist())
    # Bytes that are not UTF-8 become U+FFFD, which a text may also contain.
    if "\N{REPLACEMENT CHARACTER}" in text and not np.array_equal(tokenizer.encode(text), ids):
        return BrokenRow(INVALID_UTF8)
    return text
