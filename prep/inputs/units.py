"""Units of work: decided by the input alone, never by the number of workers.

A unit is some row groups of a parquet file, a range of lines or of documents of ids, one large file, or many small
files together.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prep.config import SourceConfig
from prep.inputs.discovery import find_files
from prep.inputs.files import IDS_SUFFIX, INDEX_SUFFIX, LINES_SUFFIXES, InputFile, Part, Unit, opened
from prep.inputs.hooks import source_identity
from prep.inputs.layouts import Layout, read_parquet_layouts
from prep.inputs.token_ids import read_ids_layout
from streaming_rwkv.location import is_remote

_FILES_PER_UNIT = 1024
_SCAN_BYTES = 1 << 20
_OPENED_AT_ONCE = 16


def find_sources(sources: dict[str, SourceConfig]) -> dict[str, list[InputFile]]:
    """Return the files of each source, sources and files sorted by name.

    Raises:
        UserError: a path does not exist, or has no readable file below it.
    """
    return {source: find_files(source, config.paths) for source, config in sorted(sources.items())}


def plan_units(
    sources: dict[str, SourceConfig], *, unit_bytes: int, files: dict[str, list[InputFile]] | None = None
) -> tuple[Unit, ...]:
    """Divide sources into units, in canonical order: by source, file and row.

    Args:
        files: the files of each source, if they have been found already.

    Raises:
        UserError: a source is empty, or a file cannot be opened.
    """
    units: list[Unit] = []
    for source, of_source in (files or find_sources(sources)).items():
        config = sources[source]
        deciding = [source, source_identity(config)]
        for group in _group(_all_parts(of_source, config, unit_bytes), unit_bytes):
            parts = tuple(part for part, _ in group)
            name = _digest([*deciding, *map(_identity, parts)])
            units.append(Unit(name=name, source=source, parts=parts, input_bytes=sum(size for _, size in group)))
    return tuple(units)


def _identity(part: Part) -> list[Any]:
    """Return all that determines a part's documents, which its location does not."""
    file = part.file
    ids = [part.ids.size, part.ids.changed_ns, part.rows] if part.ids else []
    return [file.name, file.size, file.changed_ns, part.first_row, part.row_groups, part.byte_range, *ids]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _all_parts(files: list[InputFile], config: SourceConfig, unit_bytes: int) -> Iterator[tuple[Part, int]]:
    ids = {file.path[: -len(IDS_SUFFIX)]: file for file in files if file.suffix == IDS_SUFFIX}
    files = [file for file in files if file.suffix != IDS_SUFFIX]
    parquet_files = [file for file in files if file.suffix == ".parquet"]
    layouts = dict(zip((file.path for file in parquet_files), read_parquet_layouts(parquet_files, config), strict=True))
    read_parts = functools.partial(_parts, layouts=layouts, ids=ids, unit_bytes=unit_bytes)
    if not any(is_remote(file.path) for file in files):
        for file in files:
            yield from read_parts(file)
        return
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # most of the time is waiting for S3
        for parts in pool.map(lambda file: list(read_parts(file)), files):
            yield from parts


def _parts(
    file: InputFile, *, layouts: dict[str, Layout], ids: dict[str, InputFile], unit_bytes: int
) -> Iterator[tuple[Part, int]]:
    """Yield a file's parts with their sizes, about `unit_bytes` each if the format can be divided."""
    if file.suffix == ".parquet":
        yield from _row_group_parts(file, layouts[file.path], unit_bytes)
    elif file.suffix == INDEX_SUFFIX:
        of_file = ids[file.path[: -len(INDEX_SUFFIX)]]
        for first_row, rows, size in read_ids_layout(file, of_file, unit_bytes=unit_bytes):
            yield Part(file=file, ids=of_file, first_row=first_row, rows=rows), size
    elif file.suffix in LINES_SUFFIXES and file.size > unit_bytes and not is_remote(file.path):
        yield from _line_parts(file, unit_bytes)
    else:
        yield Part(file=file), file.size


def _row_group_parts(file: InputFile, layout: Layout, unit_bytes: int) -> Iterator[tuple[Part, int]]:
    groups: list[int] = []
    size = rows = first_row = 0
    for index, (row_group_bytes, row_group_rows) in enumerate(layout):
        if groups and size + row_group_bytes > unit_bytes:
            yield Part(file=file, first_row=first_row, row_groups=tuple(groups)), size
            first_row, groups, size, rows = first_row + rows, [], 0, 0
        groups.append(index)
        size, rows = size + row_group_bytes, rows + row_group_rows
    yield Part(file=file, first_row=first_row, row_groups=tuple(groups)), size


def _line_parts(file: InputFile, unit_bytes: int) -> Iterator[tuple[Part, int]]:
    """Cut after the first line end that is at least `unit_bytes` from the cut before."""
    begin = row = first_row = at = 0
    with opened(file) as stream:
        while block := stream.read(_SCAN_BYTES):
            counted = 0
            while (newline := block.find(b"\n", max(begin + unit_bytes - at - 1, counted, 0))) >= 0:
                row += block.count(b"\n", counted, newline + 1)
                counted, end = newline + 1, at + newline + 1
                yield Part(file=file, first_row=first_row, byte_range=(begin, end)), end - begin
                begin, first_row = end, row
            row += block.count(b"\n", counted)
            at += len(block)
    if at > begin:
        yield Part(file=file, first_row=first_row, byte_range=(begin, at)), at - begin


def _group(parts: Iterable[tuple[Part, int]], unit_bytes: int) -> Iterator[list[tuple[Part, int]]]:
    """Group consecutive small parts up to `unit_bytes`."""
    group: list[tuple[Part, int]] = []
    total = 0
    for part, size in parts:
        if group and (total + size > unit_bytes or len(group) == _FILES_PER_UNIT):
            yield group
            group, total = [], 0
        group.append((part, size))
        total += size
    if group:
        yield group
