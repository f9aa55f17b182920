"""`convert`: a folder of JSON files to a folder of parquet files with one column, `text`.

`build` reads JSON as well; parquet is smaller, is read faster, and can be cut into units.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prep.config import SourceConfig
from prep.files import InputFile, find_files
from prep.readers import Part, read_part
from streaming_rwkv.config import UserError

_ROW_GROUP_CHARACTERS = 16 << 20
_SCHEMA = pa.schema([("text", pa.large_string())])


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of one file."""

    name: str
    documents: int
    rejected: dict[str, int]
    was_there: bool = False


def convert(folder: str, to: str | Path, *, text: str = "text", workers: int = 1) -> Iterator[Converted]:
    """Convert every JSON file below `folder`; names are kept, `.json.gz` and the like become `.parquet`.

    A file whose parquet is there and newer is left alone, so an interrupted conversion goes on.

    Raises:
        UserError: nothing to convert, two files with one name to be, a broken file.
    """
    files = [file for file in find_files("convert", [folder]) if file.suffix != ".parquet"]
    if not files:
        raise UserError(f"{folder}: no JSON file below it; parquet needs no conversion")
    places = {file: Path(to) / f"{file.name.removesuffix(file.suffix)}.parquet" for file in files}
    for place, count in Counter(places.values()).items():
        if count > 1:
            names = ", ".join(file.name for file in files if places[file] == place)
            raise UserError(f"{folder}: {names} would all become {place}; convert them one folder at a time")
    config = SourceConfig(paths=[folder], text=text)
    tasks = [(file, place, config) for file, place in places.items()]
    if workers == 1:
        yield from map(_convert_file, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_convert_file, tasks)


def _convert_file(task: tuple[InputFile, Path, SourceConfig]) -> Converted:
    file, place, config = task
    if place.exists() and place.stat().st_mtime_ns > file.changed_ns:
        rows = pq.read_metadata(place).num_rows
        return Converted(name=file.name, documents=rows, rejected={}, was_there=True)
    rejected: Counter[str] = Counter()
    documents = 0
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
            for texts in _row_groups(_texts(file, config, rejected)):
                documents += len(texts)
                writer.write_table(pa.table([pa.array(texts, pa.large_string())], schema=_SCHEMA))
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    return Converted(name=file.name, documents=documents, rejected=dict(rejected))


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
