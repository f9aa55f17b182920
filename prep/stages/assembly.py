"""The last stage: packed windows to streams of numbered shards with their indexes, and the manifest.

Each window numbers its shards from 0. The final numbers run through all windows of a stream.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prep.dataset.names import REJECTED_NAME, STATISTICS_NAME, shard_name
from prep.dataset.shard_writer import write_index
from prep.dataset.upload import Transfers
from prep.execution.context import BuildContext, unit_task
from prep.execution.task_store import done_folder
from prep.stages.distributions import statistics_bytes
from prep.stages.packing import shard_format
from prep.stages.records import PackedWindow, UnitRecord, Window, WindowRecord
from streaming_rwkv.filesystem import atomic_file, fsync, write_atomically
from streaming_rwkv.shards import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    ShardRecord,
    SourceCounts,
    StreamRecord,
)
from streaming_rwkv.tokenizer import Tokenizer

_FLUSHED_AT_ONCE = 16  # a disk is faster at many files together


def assemble(
    context: BuildContext,
    tokenizer: Tokenizer,
    units: Sequence[UnitRecord],
    packed: Sequence[PackedWindow],
    *,
    in_place: bool,
) -> Manifest:
    """Write indexes, statistics and rejected documents to the data set's folder, and return the manifest.

    Args:
        in_place: put the shards there too; otherwise `ShardUploads` has sent them to object storage.

    Raises:
        DataError: the counts do not balance. This is a fault of this program: no data set is better than a wrong one.
    """
    counts = _source_counts(context, units, packed)
    for source, source_counts in counts.items():
        if imbalance := source_counts.imbalance():
            raise DataError(f"{context.folder}: the counts of source {source} do not balance: {imbalance}; report this")
    by_stream = [list(windows) for _, windows in itertools.groupby(packed, key=lambda pair: pair[0].stream)]
    streams = [_assemble_stream(context, windows, in_place=in_place) for windows in by_stream]
    _collect_rejected(context)
    (context.folder / STATISTICS_NAME).write_bytes(statistics_bytes(units, packed))
    return Manifest(
        format=FORMAT,
        pack_tokens=context.config.pack_tokens,
        edges=context.config.edges,
        tokenizer=tokenizer.record(),
        config=context.recipe,
        counts=counts,
        streams=[stream for stream in streams if stream is not None],
    )


def publish_locally(context: BuildContext, manifest: Manifest) -> None:
    """Write the manifest to the local folder, after everything that it names is on the disk."""
    folders = [context.folder / stream.path for stream in manifest.streams]
    files = [file for folder in (*folders, context.folder / TOKENIZER_FOLDER) for file in folder.iterdir()]
    files += [context.folder / STATISTICS_NAME, context.folder / REJECTED_NAME]
    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        list(pool.map(fsync, [*files, *folders]))
    write_atomically(context.folder / MANIFEST_NAME, manifest.to_json())


class ShardUploads:
    """Uploads the shards of packed windows as soon as their final numbers are known.

    A window has to wait for the windows before it in its stream, which decide where its numbers begin.
    """

    def __init__(self, transfers: Transfers, windows: Sequence[Window], *, work_folder: Path) -> None:
        self._transfers = transfers
        self._windows = windows
        self._work_folder = work_folder
        self._records: dict[int, WindowRecord] = {}
        by_stream = itertools.groupby(range(len(windows)), key=lambda index: windows[index].stream)
        self._waiting = {stream: list(indices)[::-1] for stream, indices in by_stream}
        self._counted: Counter[str] = Counter()

    def add(self, index: int, record: WindowRecord) -> None:
        """Take over a packed window, by its index."""
        self._records[index] = record
        stream = self._windows[index].stream
        waiting = self._waiting[stream]
        while waiting and waiting[-1] in self._records:
            following = waiting.pop()
            window, shards = self._windows[following], self._records.pop(following).shards
            for file, shard in _number_shards(
                window, shards, first=self._counted[stream], work_folder=self._work_folder
            ):
                name = f"{stream}/{shard.basename}"
                self._transfers.put(file, name, sha256=shard.sha256, size=shard.bytes, source=window.source)
            self._counted[stream] += len(shards)


def _number_shards(
    window: Window, shards: Sequence[ShardRecord], *, first: int, work_folder: Path
) -> Iterator[tuple[Path, ShardRecord]]:
    """Yield the file of each shard of a window, and the shard under its final name, numbered from `first`."""
    folder = done_folder(work_folder, window.task)
    for number, shard in enumerate(shards, start=first):
        yield folder / shard.basename, shard.model_copy(update={"basename": shard_name(number)})


def _assemble_stream(context: BuildContext, packed: Sequence[PackedWindow], *, in_place: bool) -> StreamRecord | None:
    """Write a stream's folder; returns None if all its documents are duplicates."""
    first = packed[0][0]
    numbered: list[tuple[Path, ShardRecord]] = []
    for window, record in packed:
        numbered += _number_shards(window, record.shards, first=len(numbered), work_folder=context.work_folder)
    if not numbered:
        return None
    folder = context.folder / first.stream
    folder.mkdir(parents=True, exist_ok=True)
    if in_place:
        for file, shard in numbered:
            _link(file, folder / shard.basename)
    shards = [shard for _, shard in numbered]
    index_sha256 = write_index(shards, folder, form=shard_format(context))
    records = [record for _, record in packed]
    return StreamRecord(
        split=first.split,
        source=first.source,
        lower=first.lower,
        upper=first.upper,
        documents=sum(record.documents for record in records),
        pieces=sum(record.pieces for record in records),
        targets=sum(record.targets for record in records),
        bytes=sum(record.bytes for record in records),
        packs=sum(record.packs for record in records),
        index_sha256=index_sha256,
        shards=shards,
    )


def _link(file: Path, target: Path) -> None:
    """Give the file a second name; under its first one, a start after a kill finds the finished task."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        shutil.copyfile(file, target)


def _source_counts(
    context: BuildContext, units: Sequence[UnitRecord], packed: Sequence[PackedWindow]
) -> dict[str, SourceCounts]:
    """Return the counts of each source: what tokenization read, and what packing wrote."""
    counts = {}
    for source in sorted(context.config.sources):
        read = [unit for unit in units if unit.source == source]
        written = [(window.split, record) for window, record in packed if window.source == source]
        rejected = sum((Counter(unit.rejected) for unit in read), Counter[str]())
        counts[source] = SourceCounts(
            documents_read=sum(unit.documents_read for unit in read),
            documents={split: sum(record.documents for of, record in written if of == split) for split in SPLITS},
            duplicates=sum(record.duplicates for _, record in written),
            rejected=dict(sorted(rejected.items())),
            targets_read=sum(unit.targets_read for unit in read),
            targets={split: sum(record.targets for of, record in written if of == split) for split in SPLITS},
            targets_duplicate=sum(record.duplicate_targets for _, record in written),
            targets_cut=sum(unit.targets_cut for unit in read),
        )
    return counts


def _collect_rejected(context: BuildContext) -> None:
    """Write the rejected documents of all units to one file."""
    with atomic_file(context.folder / REJECTED_NAME) as temporary, temporary.open("wb") as together:
        for unit in context.units:
            with (done_folder(context.work_folder, unit_task(unit)) / REJECTED_NAME).open("rb") as one:
                shutil.copyfileobj(one, together)
