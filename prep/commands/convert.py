"""`convert`: a folder of JSON files to a folder of parquet files with one column, `text`.

`build` reads JSON as well; parquet is smaller, faster to read, and can be divided into units.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from prep.config import SourceConfig
from prep.inputs.discovery import find_files
from prep.inputs.faults import missing_text
from prep.inputs.files import LINES_SUFFIXES, InputFile, Part
from prep.inputs.readers import read_part
from streaming_rwkv.config import UserError
from streaming_rwkv.console import shown
from streaming_rwkv.filesystem import (
    atomic_file,
    check_replaceable,
    explained_writes,
    make_folder,
    open_regular_file,
    sole_writer,
)
from streaming_rwkv.outputs import check_apart, check_outside

_ROW_GROUP_CHARACTERS = 16 << 20
_SCHEMA = pa.schema([("text", pa.large_string())])
_ORIGIN_KEY = "streaming-rwkv.origin"  # in a parquet file's metadata: the file and key that it was made from
_REJECTED_KEY = "streaming-rwkv.rejected"
_COUNTS = TypeAdapter(dict[str, int])
_WHAT, _REMEDY = "folder of the parquet files", "name another"
_Task = tuple[InputFile, Path, SourceConfig]


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """The result for one file."""

    name: str
    documents: int
    rejected: dict[str, int]
    existed: bool = False


def run(options: argparse.Namespace) -> int:
    """Convert a folder, printing a line for each file; return the exit status."""
    for file in convert(options.folder, options.to, text=options.text, workers=options.workers):
        rejected = "".join(f", {count} rejected: {reason}" for reason, count in file.rejected.items())
        existed = " (already converted)" if file.existed else ""
        print(f"{shown(file.name)}: {file.documents:,} documents{rejected}{existed}")
    return 0


def convert(folder: str, to: str | Path, *, text: str = "text", workers: int = 1) -> Iterator[ConvertedFile]:
    """Convert every JSON file below `folder`; names are kept, with `.parquet` in place of suffixes such as `.json.gz`.

    A file that has been converted with the same key and has not changed since is skipped, so an interrupted conversion
    can be resumed.

    Raises:
        UserError: nothing to convert, two files with one target, `to` inside `folder` or around it, a file that is not
            of a conversion in place of a target, another process that converts into the same folder, a broken file,
            or, at the end, no text in any file.
    """
    files = [
        file
        for file in find_files("convert", [folder])
        if file.suffix.startswith(".json") or file.suffix.startswith(LINES_SUFFIXES)
    ]
    if not files:
        raise UserError(f"{folder}: found no JSON file below it; parquet needs no conversion")
    places = {file: Path(to) / f"{file.stem}.parquet" for file in files}
    for place, count in Counter(places.values()).items():
        if count > 1:
            names = ", ".join(file.name for file in files if places[file] == place)
            raise UserError(f"{folder}: {names} would all become {place}; convert them one folder at a time")
    config = SourceConfig(paths=[folder], text=text)
    tasks = [(file, place, config) for file, place in places.items()]
    documents = 0
    rejected: Counter[str] = Counter()
    check_apart(to, folder, remedy=_REMEDY)
    check_outside(to, what=_WHAT, remedy=_REMEDY)
    with sole_writer(Path(to), what=_WHAT, remedy=_REMEDY):
        with explained_writes(Path(to)):
            for place in places.values():
                check_replaceable(place, _is_converted, remedy=_REMEDY)
        for converted in _in_processes(tasks, workers):
            documents += converted.documents
            rejected.update(converted.rejected)
            yield converted
    if not documents and (without := rejected[missing_text(config.text)]):
        raise UserError(
            f"{folder}: of {rejected.total()} documents {without} have no {text!r}; name the key with --text"
        )


def _in_processes(tasks: list[_Task], workers: int) -> Iterator[ConvertedFile]:
    if workers == 1:
        yield from map(_convert_file, tasks)
        return
    workers = min(workers, len(tasks))
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(_convert_file, tasks)
    except BrokenProcessPool:
        raise UserError(
            "convert: a worker process died, most likely killed for want of memory (`dmesg` tells); run the same "
            "command again with fewer --workers: finished files are kept"
        ) from None


def _convert_file(task: _Task) -> ConvertedFile:
    file, place, config = task
    origin: dict[str, str | int] = {"text": config.text, "bytes": file.size, "changed_ns": file.changed_ns}
    if (converted := _converted(place, file, origin)) is not None:
        return converted
    rejected: Counter[str] = Counter()
    documents = 0
    make_folder(place.parent, what=_WHAT, remedy=_REMEDY)
    # An open file, since pyarrow would take a name with a colon for a URI.
    with (
        explained_writes(place),
        atomic_file(place) as temporary,
        temporary.open("wb") as opened,
        pq.ParquetWriter(opened, _SCHEMA, compression="zstd") as writer,
    ):
        for texts in _row_groups(_texts(file, config, rejected)):
            documents += len(texts)
            writer.write_table(pa.table([pa.array(texts, pa.large_string())], schema=_SCHEMA))
        writer.add_key_value_metadata({_ORIGIN_KEY: json.dumps(origin), _REJECTED_KEY: json.dumps(rejected)})
    return ConvertedFile(name=file.name, documents=documents, rejected=dict(rejected))


def _is_converted(place: Path) -> bool:
    """Return whether a file was written by a conversion, of this source or another."""
    try:
        with open_regular_file(place) as opened:
            return _ORIGIN_KEY.encode() in (pq.read_metadata(opened).metadata or {})
    except (OSError, UserError, pa.ArrowException, ValueError):
        return False


def _converted(place: Path, file: InputFile, origin: dict[str, str | int]) -> ConvertedFile | None:
    """Return the result that is stored in `place` if it was made from `origin`, else None."""
    try:
        with open_regular_file(place) as opened:
            metadata = pq.read_metadata(opened)
        notes = metadata.metadata or {}
        if json.loads(notes.get(_ORIGIN_KEY.encode(), b"null")) != origin:
            return None
        rejected = _COUNTS.validate_json(notes.get(_REJECTED_KEY.encode(), b""))
    except (OSError, UserError, pa.ArrowException, ValueError, RecursionError):  # not written by this
        return None
    return ConvertedFile(name=file.name, documents=metadata.num_rows, rejected=rejected, existed=True)


def _texts(file: InputFile, config: SourceConfig, rejected: Counter[str]) -> Iterator[list[str]]:
    for batch in read_part(Part(file=file), config):
        rejected.update(rejection.reason for rejection in batch.rejections)
        yield batch.texts


def _row_groups(batches: Iterable[list[str]]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for batch in batches:
        texts += batch
        characters += sum(map(len, batch))
        if characters >= _ROW_GROUP_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts
