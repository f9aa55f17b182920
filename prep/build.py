"""`build`: from a configuration to a finished data set.

    plan ─▶ units (tokenize) ─▶ ranges of hashes (duplicates) ─▶ windows (pack, write shards) ─▶ publish

Each step is a list of tasks that the input alone decides; the engine does them in any order, and each is done or not
there. The manifest comes last.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.config import PrepConfig
from prep.dataset.finished import find_manifest
from prep.dataset.shard_writer import Shard, write_index
from prep.dataset.upload import ShardUploads, Transfers, check_free, final_shards, publish
from prep.document import Rejection
from prep.execution.context import Job
from prep.execution.engine import Run, Task, start
from prep.execution.observer import Observer
from prep.execution.resume import check_plan, file_name, make_plan, save_plan
from prep.execution.task_store import (
    DONE_FOLDER,
    TEMPORARY_FOLDER,
    WorkError,
    done_folder,
    explained_write_errors,
    locked,
)
from prep.inputs.files import InputFile, content_digest
from prep.inputs.units import CutFiles, find_sources, nothing_in, plan_units
from prep.stages.deduplication import do_range, join_ranges, plan_ranges
from prep.stages.packing import Window, WindowRecord, do_window, plan_windows
from prep.stages.statistics import STATISTICS_NAME, statistics_bytes
from prep.stages.tokenization import (
    REJECTED_NAME,
    UNITS_FOLDER,
    AuditSample,
    Progress,
    UnitRecord,
    count_unit,
    do_unit,
    unit_name,
)
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import atomic_file, atomic_folder, fsync, write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    SourceBooks,
    StreamRecord,
    read_manifest,
)
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A data set, and whether it was there before."""

    manifest: Manifest
    was_finished: bool


class AuditError(UserError):
    """The fast tokenizer gave other ids than the one that defines them."""


# Units whose sample was compared have an empty folder here. One that a kill left without is done again, so that it
# does not depend on the kill whether a difference is found.
AUDITED_FOLDER = "audited"
# Is there from when the fast tokenizer was found to differ to the end of the build.
BY_REFERENCE_NAME = "by-reference"


def build(
    config: PrepConfig, *, observer: Observer | None = None, fork: bool = False, accept_changes: bool = False
) -> Built:
    """Build the data set that `config` describes, or go on where an earlier start was interrupted.

    Args:
        observer: is told how it goes on.
        fork: see `prep.execution.engine.start`.
        accept_changes: see `prep.execution.resume.check_plan`.

    Raises:
        UserError: anything that its text says how to mend; finished work is kept.
    """
    observer = observer or Observer()
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    _check_out_is_no_input(config)
    files = find_sources(config.sources)
    plan = make_plan(config, tokenizer.record(), files)
    with contextlib.closing(open_store(config.out)) if is_remote(config.out) else nullcontext() as store:
        finished = functools.partial(_finished, plan, files, config, store, accept_changes=accept_changes)
        if (manifest := finished()[0]) is not None:
            if (config.work_folder / DONE_FOLDER).exists():  # killed between the manifest and the end
                with locked(config.work_folder):
                    _clear(config)
            return Built(manifest=manifest, was_finished=True)
        units = plan_units(config.sources, unit_bytes=config.unit_bytes, files=files)
        job = Job(
            config=config,
            units=units,
            vocab_size=tokenizer.vocab_size,
            given_tokenizer=tokenizer,
            by_reference=(config.work_folder / BY_REFERENCE_NAME).exists(),
        )
        with explained_write_errors(job.out), locked(job.work):
            # Again: until we had the lock, another build may have been here.
            manifest, changes = finished()
            if manifest is not None:
                return Built(manifest=manifest, was_finished=True)
            if changes:
                job = _keep_units_only(job, changes)
            save_plan(plan, work=job.work)
            if store is not None:
                check_free(store)
                store.close()  # before workers are forked: they would inherit its connections
            _save_tokenizer(tokenizer, job)
            _forget_unaudited(job)
            try:
                manifest = _build_with(job, tokenizer, observer, store, plan, files, fork=fork)
            except AuditError as error:
                if job.by_reference:
                    raise
                _warn_of_difference(error)
                shutil.rmtree(job.work / DONE_FOLDER, ignore_errors=True)
                write_atomically(job.work / BY_REFERENCE_NAME, str(error).encode())
                job = replace(job, by_reference=True)
                # Not forked: the reference has encoded something here, so it has threads.
                manifest = _build_with(job, tokenizer, observer, store, plan, files, fork=False)
            if store is None:
                _flush_all(job, manifest)
                write_atomically(job.out / MANIFEST_NAME, manifest.to_json())
            _clear(config)
    return Built(manifest=manifest, was_finished=False)


def _check_out_is_no_input(config: PrepConfig) -> None:
    """A build that reads what it writes cannot be told from one whose input changes."""
    for source, of_source in config.sources.items():
        for path in of_source.paths:
            folder = Path(path).expanduser()
            if not is_remote(path) and folder.is_dir() and config.folder.resolve().is_relative_to(folder.resolve()):
                key = "work" if is_remote(config.out) else "out"
                raise WorkError(
                    f"{config.folder}: lies in {path}, which sources.{source} reads; choose another `{key}=`"
                )


def _build_with(
    job: Job,
    tokenizer: Tokenizer,
    observer: Observer,
    store: Store | None,
    plan: dict[str, Any],
    files: dict[str, list[InputFile]],
    *,
    fork: bool,
) -> Manifest:
    """Do all tasks, and put together what they made.

    Raises:
        AuditError: the ids are not those of the reference; nothing was published.
    """
    with (
        start(job, on_report=_reports_to(observer, tokenizer), fork=fork) as run,
        Transfers(store) if store is not None else nullcontext() as transfers,
    ):
        if job.config.audit_bytes:
            tokenizer.encode_reference([])  # loads it while the workers load theirs
        units_done, windows, windows_done = _do_all(job, run, observer, transfers)
        save_plan(plan, work=job.work, contents=_contents(files, run, observer))
        packed = list(zip(windows, windows_done, strict=True))
        manifest = _assemble(job, tokenizer, units_done, packed, in_place=transfers is None)
        if transfers is not None:
            transfers.wait(observer)
            publish(job.out, manifest, transfers)
    return manifest


def _forget_unaudited(job: Job) -> None:
    for unit in job.units:
        if job.audit_bytes(unit) and not done_folder(job.work, f"{AUDITED_FOLDER}/{unit.name}").exists():
            shutil.rmtree(done_folder(job.work, unit_name(unit)), ignore_errors=True)


def _warn_of_difference(error: AuditError) -> None:
    logger.warning("%s; all texts are encoded with the reference from the beginning, some twenty times slower", error)


def _finished(
    plan: dict[str, Any],
    files: dict[str, list[InputFile]],
    config: PrepConfig,
    store: Store | None,
    *,
    accept_changes: bool,
) -> tuple[Manifest | None, list[str]]:
    """The manifest of a finished build of the same plan, or None and the changes since an unfinished one began.

    Raises:
        WorkError: another build, or other files, lie there.
    """
    if store is not None:
        manifest = find_manifest(store)
    else:
        manifest = read_manifest(config.folder) if (config.folder / MANIFEST_NAME).exists() else None
    changes = check_plan(
        plan,
        files=files,
        out=config.out,
        folder=config.folder,
        work=config.work_folder,
        manifest=manifest,
        accept_changes=accept_changes,
    )
    return manifest, changes


def _keep_units_only(job: Job, changes: list[str]) -> Job:
    """Of the work for another input, what this one needs: the units that it has too.

    With other input the fast tokenizer may not be found to differ: the work of the reference is not kept.
    """
    logger.warning("%s: goes on with changed input:\n  %s", job.config.out, "\n  ".join(changes))
    for split in SPLITS:
        shutil.rmtree(job.out / split, ignore_errors=True)
    if job.by_reference:
        shutil.rmtree(job.work / DONE_FOLDER, ignore_errors=True)
        (job.work / BY_REFERENCE_NAME).unlink()
        return replace(job, by_reference=False)
    units = {Path(unit_name(unit)).name for unit in job.units}
    for folder in done_folder(job.work, "").glob("*"):
        for gone in folder.iterdir() if folder.name in (UNITS_FOLDER, AUDITED_FOLDER) else [folder]:
            if gone.name not in units:
                shutil.rmtree(gone)
    return job


def count(config: PrepConfig, *, observer: Observer | None = None) -> list[UnitRecord]:
    """What `build` would read and tokenize, duplicates included, without writing anything.

    Raises:
        UserError: as `build` does, of what it reads.
    """
    observer = observer or Observer()
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    units = plan_units(config.sources, unit_bytes=config.unit_bytes)
    with tempfile.TemporaryDirectory() as folder:
        # Workers load the tokenizer from the data set's folder; this one is thrown away, and no other node sees it.
        job = Job(
            config=config.model_copy(update={"out": folder, "work": None, "engine": "processes"}),
            units=units,
            vocab_size=tokenizer.vocab_size,
            given_tokenizer=tokenizer,
        )
        _save_tokenizer(tokenizer, job)
        try:
            records = _count_with(job, tokenizer, observer)
        except AuditError as error:
            _warn_of_difference(error)
            records = _count_with(replace(job, by_reference=True), tokenizer, observer)
    _check_not_empty(job, records)
    return records


def _count_with(job: Job, tokenizer: Tokenizer, observer: Observer) -> list[UnitRecord]:
    with start(job, on_report=_reports_to(observer, tokenizer)) as run:
        sizes = [(unit.source, unit.input_bytes) for unit in job.units]
        return _step("counting", run, count_unit, job.units, sizes, observer, _checks_cut_files(job))


def _do_all(
    job: Job, run: Run, observer: Observer, transfers: Transfers | None
) -> tuple[list[UnitRecord], list[Window], list[WindowRecord]]:
    sizes = [(unit.source, unit.input_bytes) for unit in job.units]
    check_cut_files = _checks_cut_files(job)

    def on_unit(index: int, record: UnitRecord) -> None:
        check_cut_files(index, record)
        if job.audit_bytes(job.units[index]):  # what it reported came before its result
            done_folder(job.work, f"{AUDITED_FOLDER}/{job.units[index].name}").mkdir(parents=True, exist_ok=True)

    units: list[UnitRecord] = _step("tokenizing", run, do_unit, job.units, sizes, observer, on_unit)
    _check_not_empty(job, units)
    ranges = plan_ranges(units) if job.config.deduplicate == "exact" else []
    _step("finding duplicates", run, do_range, ranges, [("all sources", 1)] * len(ranges), observer)
    if ranges:
        join_ranges(job, units, ranges=len(ranges))
    windows = plan_windows(job, units)
    sizes = [(window.source, window.tokens) for window in windows]
    on_result = ShardUploads(transfers, windows, work=job.work).packed if transfers is not None else None
    records: list[WindowRecord] = _step("packing", run, do_window, windows, sizes, observer, on_result)
    return units, windows, records


def _checks_cut_files(job: Job) -> Callable[[int, UnitRecord], None]:
    files = CutFiles(job.units)
    return lambda index, record: files.has_read(job.units[index], record.line_counts)


def _contents(files: dict[str, list[InputFile]], run: Run, observer: Observer) -> dict[str, str]:
    """The digest of each file, by the plan's names: a copy of the corpus has other times, and the same digests.

    Files are read once more, as a whole: of parquet, tokenizing has read a column.
    """
    items = [file for of_source in files.values() for file in of_source]
    digests = _step("hashing files", run, _digest, items, [(file.source, file.size) for file in items], observer)
    return dict(zip(map(file_name, items), digests, strict=True))


def _digest(job: Job, file: InputFile, report: Callable[[Any], None]) -> str:
    return content_digest(file)


def _step(
    name: str,
    run: Run,
    task: Task,
    items: Sequence[Any],
    sizes: Sequence[tuple[str, int]],
    observer: Observer,
    on_result: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """The results in the order of the items; `on_result` is given each with its index as soon as it comes.

    Large items are begun first, or one would keep everybody waiting; those of about one size in their order, since a
    window's shards can go up when those of the windows before it are counted.
    """
    totals: Counter[str] = Counter()
    for source, size in sizes:
        totals[source] += size
    observer.step(name, totals=totals)
    order = sorted(range(len(items)), key=lambda index: -sizes[index][1].bit_length())
    results: dict[int, Any] = {}
    for place, result in run(task, [items[index] for index in order]):
        results[order[place]] = result
        if on_result is not None:
            on_result(order[place], result)
        observer.done(*sizes[order[place]])
    return [results[index] for index in range(len(items))]


def _reports_to(observer: Observer, tokenizer: Tokenizer) -> Callable[[Any], None]:
    audit = _Audit(tokenizer)

    def on_report(report: Progress | AuditSample | Rejection) -> None:
        match report:
            case Progress():
                observer.progress(report)
            case Rejection():
                observer.rejection(report)
            case AuditSample():
                audit(report)

    return on_report


class _Audit:
    """Compares ids with the reference's, and the texts behind them with the texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_warned = False

    def __call__(self, sample: AuditSample) -> None:
        """Raises `AuditError` at the first id that is not the reference's."""
        expected = self._tokenizer.encode_reference(sample.texts)
        for where, text, found, wanted in zip(sample.where, sample.texts, sample.ids, expected, strict=True):
            if not np.array_equal(found, wanted):
                raise self._difference(where, text, found, wanted)
            if not self._has_warned:
                self._warn_if_lossy(where, text, self._tokenizer.decode(wanted))

    def _difference(self, where: str, text: str, found: NDArray[Any], wanted: NDArray[Any]) -> AuditError:
        at = _first_difference(found.tolist(), wanted.tolist())
        context = self._tokenizer.decode(wanted[max(0, at - 4) : at + 4])
        return AuditError(
            f"tokenizer {self._tokenizer.name}: {where}: id {at} is {found[at : at + 1].tolist()}, the reference gives "
            f"{wanted[at : at + 1].tolist()} (near {context!r} in a text of {len(text)} characters)"
        )

    def _warn_if_lossy(self, where: str, text: str, decoded: str) -> None:
        if decoded == text:
            return
        at = _first_difference(text, decoded)
        near = slice(max(0, at - 12), at + 12)
        logger.warning(
            "tokenizer %s: texts do not come back from their ids, so the model never sees all of them: %s: %r comes "
            "back as %r. Choose a byte-level tokenizer if that is not meant (`python -m prep train-tokenizer`)",
            self._tokenizer.name,
            where,
            text[near],
            decoded[near],
        )
        self._has_warned = True


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


def _save_tokenizer(tokenizer: Tokenizer, job: Job) -> None:
    folder = job.out / TOKENIZER_FOLDER
    try:
        if load_tokenizer(folder).record() == tokenizer.record():
            return
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder, within=job.work / TEMPORARY_FOLDER) as temporary:
        tokenizer.save(temporary)


def _check_not_empty(job: Job, units: Sequence[UnitRecord]) -> None:
    for source, config in job.config.sources.items():
        of_source = [unit for unit in units if unit.source == source]
        if not sum(unit.documents for unit in of_source):
            rejected = sum((Counter(unit.rejected) for unit in of_source), Counter[str]())
            raise nothing_in(source, config, rejected=rejected)


# --- what is left when a build is done ---


def _assemble(
    job: Job,
    tokenizer: Tokenizer,
    units: Sequence[UnitRecord],
    windows: Sequence[tuple[Window, WindowRecord]],
    *,
    in_place: bool,
) -> Manifest:
    """Put indexes and what else describes the data set in their places, and with `in_place` the shards too.

    Raises:
        DataError: the books do not balance: our mistake, and better no data set than a wrong one.
    """
    books = _books(job, units, windows)
    for source, book in books.items():
        if wrong := book.imbalance():
            raise DataError(f"{job.out}: the books of source {source} do not balance: {wrong}; report this")
    streams = [_assemble_stream(job, members, in_place=in_place) for members in _by_stream(windows)]
    manifest = Manifest(
        format=FORMAT,
        pack_tokens=job.config.pack_tokens,
        edges=job.config.edges,
        tokenizer=tokenizer.record(),
        config=job.config.deciding(),
        books=books,
        streams=[stream for stream in streams if stream is not None],
    )
    _publish_rejected(job)
    (job.out / STATISTICS_NAME).write_bytes(statistics_bytes(units, windows))
    return manifest


def _flush_all(job: Job, manifest: Manifest) -> None:
    """What the manifest will name must be on the disk first; many files at a time, since a disk takes them together."""
    folders = [job.out / stream.path for stream in manifest.streams]
    files = [file for folder in (*folders, job.out / TOKENIZER_FOLDER) for file in folder.iterdir()]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fsync, [*files, job.out / STATISTICS_NAME, job.out / REJECTED_NAME, *folders]))


def _by_stream(
    windows: Sequence[tuple[Window, WindowRecord]],
) -> list[list[tuple[Window, WindowRecord]]]:
    return [list(members) for _, members in itertools.groupby(windows, key=lambda pair: pair[0].stream)]


def _assemble_stream(
    job: Job, windows: Sequence[tuple[Window, WindowRecord]], *, in_place: bool
) -> StreamRecord | None:
    """One folder of shards with its index; None if duplicates were all it had."""
    first = windows[0][0]
    placed: list[tuple[Path, Shard]] = []
    for window, record in windows:
        placed += final_shards(window, record.shards, first=len(placed), work=job.work)
    if not placed:
        return None
    folder = job.out / first.stream
    folder.mkdir(parents=True, exist_ok=True)
    if in_place:
        for file, shard in placed:
            _link(file, folder / shard.record.basename)
    shards = [shard for _, shard in placed]
    index_sha256 = write_index(shards, folder, form=job.shard_format)
    records = [record for _, record in windows]
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
        shards=[shard.record for shard in shards],
    )


def _link(file: Path, place: Path) -> None:
    """A second name for the file: after a kill both steps still find it."""
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:  # a file system without links
        shutil.copyfile(file, place)


def _books(
    job: Job, units: Sequence[UnitRecord], windows: Sequence[tuple[Window, WindowRecord]]
) -> dict[str, SourceBooks]:
    """What the first step read against what the second step wrote."""
    books = {}
    for source in sorted(job.config.sources):
        read = [unit for unit in units if unit.source == source]
        written = [(window.split, record) for window, record in windows if window.source == source]
        rejected = sum((Counter(unit.rejected) for unit in read), Counter[str]())
        books[source] = SourceBooks(
            documents_read=sum(unit.documents_read for unit in read),
            documents={split: sum(record.documents for of, record in written if of == split) for split in SPLITS},
            duplicates=sum(record.duplicates for _, record in written),
            rejected=dict(sorted(rejected.items())),
            targets_read=sum(unit.targets_read for unit in read),
            targets={split: sum(record.targets for of, record in written if of == split) for split in SPLITS},
            targets_duplicate=sum(record.duplicate_targets for _, record in written),
            targets_cut=sum(unit.targets_cut for unit in read),
        )
    return books


def _publish_rejected(job: Job) -> None:
    with atomic_file(job.out / REJECTED_NAME) as temporary, temporary.open("wb") as together:
        for unit in job.units:
            with (done_folder(job.work, unit_name(unit)) / REJECTED_NAME).open("rb") as one:
                shutil.copyfileobj(one, together)


def _clear(config: PrepConfig) -> None:
    """All but the plan, by which the next start knows that there is nothing to do, and the data set if it is here."""
    if is_remote(config.out):
        for name in (*SPLITS, TOKENIZER_FOLDER):
            shutil.rmtree(config.folder / name, ignore_errors=True)
        for name in (STATISTICS_NAME, REJECTED_NAME):
            (config.folder / name).unlink(missing_ok=True)
    (config.work_folder / BY_REFERENCE_NAME).unlink(missing_ok=True)
    for folder in (TEMPORARY_FOLDER, DONE_FOLDER):  # the last one shows that there is something to clear
        shutil.rmtree(config.work_folder / folder, ignore_errors=True)
