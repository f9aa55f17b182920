"""The first step: one unit of input to tokenized pieces, sorted by stream.

texts ─ tokenizer ─▶ ids ─ bos, eos ─▶ stored tokens ─ cut ─▶ pieces ─ sort by stream ─▶ blocks
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prep.document import Documents, Rejection, content_hashes, in_validation
from prep.execution.context import Job
from prep.execution.intermediate import (
    HASHES_NAME,
    PIECES_NAME,
    Block,
    HashedFile,
    SortedPieces,
    write_blocks,
    write_hashes,
)
from prep.execution.task_store import DoneRecord, finish, load_done, temporary_task_folder
from prep.inputs.line_check import LineCounts, add_counts
from prep.inputs.readers import FILTERED, TRANSFORMED_AWAY, InputError
from prep.inputs.units import Unit, read_unit
from prep.ragged import gather, offsets_of
from prep.stages import buckets
from streaming_rwkv.tokenizer import TokenBatch, Tokenizer
from streaming_rwkv.tokenizer_json import TextError

UNITS_FOLDER = "units"
REJECTED_NAME = "rejected.jsonl"
HOLDS_SPECIAL = "text encodes to bos or eos"

# Pieces are written in stretches of about as many tokens: few blocks, bounded memory.
_STRETCH_TOKENS = 4 << 20
_REJECTIONS_REPORTED = 5  # of each reason, while the unit is worked on; all of them are listed
LENGTHS_PER_DOUBLING = 4


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What was read since the last message."""

    source: str
    documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class AuditSample:
    """Some documents with the ids that the fast tokenizer gave, to be compared with its reference."""

    where: list[str]
    texts: list[str]
    ids: list[NDArray[np.uint32]]


Report = Callable[[Progress | AuditSample | Rejection], None]


class StreamCount(NamedTuple):
    """What a unit has for one stream, duplicates included."""

    documents: int
    pieces: int
    targets: int


class UnitRecord(DoneRecord):
    """What came out of a unit."""

    source: str
    documents_read: int
    documents: int  # that were not rejected
    rejected: dict[str, int]  # by reason
    text_bytes: int
    targets_read: int
    targets_cut: int
    streams: list[StreamCount]
    blocks: list[Block]
    hash_runs: list[int]  # documents in each
    lengths: dict[int, int]  # documents by floor(4 log2(length))
    line_counts: dict[str, LineCounts]  # of files of which it is only a part


def unit_name(unit: Unit) -> str:
    return f"{UNITS_FOLDER}/{unit.name}"


def do_unit(job: Job, unit: Unit, report: Report) -> UnitRecord:
    """The unit's record; the unit is done if it is not done yet."""
    name = unit_name(unit)
    record = load_done(job.work, name, UnitRecord)
    if record is None:
        with temporary_task_folder(job.work) as folder:
            record = tokenize_unit(job, unit, folder=folder, report=report)
            finish(folder, record, work=job.work, name=name)
    return record


def tokenize_unit(job: Job, unit: Unit, *, folder: Path, report: Report) -> UnitRecord:
    """Tokenize, cut and sort one unit into `folder`.

    Raises:
        InputError: a broken file; a broken document with `on_error: stop`.
    """
    tally = _Tally(unit, streams=len(job.streams))
    blocks: list[Block] = []
    hash_runs: list[int] = []
    with ExitStack() as stack:
        pieces_file, hashes_file, rejected_file = (
            stack.enter_context(HashedFile(folder / name)) for name in (PIECES_NAME, HASHES_NAME, REJECTED_NAME)
        )
        stretch: list[_Chunk] = []

        def write_stretch() -> None:
            blocks.extend(write_blocks([chunk.pieces for chunk in stretch], pieces_file))
            if stretch and job.config.deduplicate == "exact":
                hashes = np.concatenate([chunk.hashes for chunk in stretch])
                numbers = np.arange(stretch[0].first, stretch[0].first + len(hashes), dtype=np.uint32)
                hash_runs.append(write_hashes(hashes, numbers, hashes_file))
            stretch.clear()

        for chunk in _chunks(job, unit, report=report):
            tally.add(chunk)
            rejected_file.write(b"".join(_json_line(rejection) for rejection in chunk.rejections))
            stretch.append(chunk)
            if sum(len(chunk.pieces.tokens) for chunk in stretch) >= _STRETCH_TOKENS:
                write_stretch()
        write_stretch()
        files = {file.name: file.record() for file in (pieces_file, hashes_file, rejected_file)}
    return tally.record(source=unit.source, files=files, blocks=blocks, hash_runs=hash_runs)


def count_unit(job: Job, unit: Unit, report: Report) -> UnitRecord:
    """The same counts without writing anything."""
    tally = _Tally(unit, streams=len(job.streams))
    for chunk in _chunks(job, unit, report=report):
        tally.add(chunk)
    return tally.record(source=unit.source, files={}, blocks=[], hash_runs=[])


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """N tokenized documents."""

    first: int  # the first one's number in the unit
    pieces: SortedPieces
    hashes: NDArray[np.uint64]  # (N, 2)
    inputs: NDArray[np.int64]  # (N,)
    text_bytes: int
    read: int
    targets_cut: int
    rejections: list[Rejection]
    line_counts: dict[str, LineCounts]


def _chunks(job: Job, unit: Unit, *, report: Report) -> Iterator[_Chunk]:
    """The unit's documents, tokenized, cut, and sorted by stream."""
    first = 0
    seen: Counter[str] = Counter()
    audit_bytes = job.audit_bytes(unit)
    asked_for = {FILTERED, TRANSFORMED_AWAY, _too_long(job)}  # by the configuration: nothing is broken there
    for documents in read_unit(unit, job.config.sources[unit.source]):
        documents, batch = _encoded(job.tokenizer, documents)
        if audit_bytes and documents.texts:
            report(_audit_sample(job.tokenizer, documents, batch, budget=audit_bytes))
            audit_bytes = 0
        documents, batch = _without_unusable(job, documents, batch)
        for rejection in documents.rejections:
            if job.config.on_error == "stop" and rejection.reason not in asked_for:
                raise InputError(
                    f"{rejection}; mend it, or set on_error=skip to leave such documents out and count them"
                )
            seen[rejection.reason] += 1
            if seen[rejection.reason] <= _REJECTIONS_REPORTED:
                report(rejection)
        chunk = _chunk(job, documents, batch, first=first)
        first += len(batch)
        report(
            Progress(
                source=unit.source,
                documents=documents.read,
                text_bytes=chunk.text_bytes,
                tokens=int(chunk.inputs.sum()),
            )
        )
        yield chunk


def _chunk(job: Job, documents: Documents, batch: TokenBatch, *, first: int) -> _Chunk:
    config, tokenizer = job.config, job.tokenizer
    encoded = [text.encode() for text in documents.texts]
    text_bytes = np.fromiter(map(len, encoded), np.int64, count=len(encoded))
    hashes = content_hashes(encoded, seed=config.split_seed)
    tokens, offsets = buckets.stored_tokens(
        batch, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=job.token_dtype
    )
    inputs = np.diff(offsets) - 1
    largest = config.edges[-1]
    pieces = buckets.cut(inputs, largest=largest, truncate=config.long_documents == "truncate")
    is_cut = bool(len(inputs)) and int(inputs.max()) > largest
    byte_counts = buckets.piece_bytes(
        pieces, batch, text_bytes=text_bytes, token_bytes=tokenizer.token_bytes if is_cut else None
    )
    split = in_validation(hashes, fraction=config.validation)[pieces.documents]
    stream = split * len(config.edges) + buckets.bucket_of(pieces.inputs, edges=config.edges)
    order = np.argsort(stream, kind="stable")
    lengths = pieces.inputs[order] + 1
    return _Chunk(
        first=first,
        pieces=SortedPieces(
            bounds=offsets_of(np.bincount(stream, minlength=len(job.streams))),
            columns={
                "lengths": lengths.astype(np.uint32),
                "starts": pieces.starts[order].astype(np.uint32),
                "bytes": byte_counts[order].astype(np.uint32),
                "documents": (first + pieces.documents[order]).astype(np.uint32),
                "keys": documents.keys[pieces.documents[order]],
            },
            tokens=gather(tokens, (offsets[pieces.documents] + pieces.starts)[order], lengths),
        ),
        hashes=hashes,
        inputs=inputs,
        text_bytes=int(text_bytes.sum()),
        read=documents.read,
        targets_cut=int(inputs.sum() - pieces.inputs.sum()),
        rejections=documents.rejections,
        line_counts=documents.line_counts,
    )


def _encoded(tokenizer: Tokenizer, documents: Documents) -> tuple[Documents, TokenBatch]:
    """The ids of each text; documents without ids are left out, for the tokenizer's reason."""
    try:
        return documents, tokenizer.encode_batch(documents.texts)
    except TextError:  # some are at fault: find out which
        pass
    reasons: dict[int, str] = {}
    for index, text in enumerate(documents.texts):
        try:
            tokenizer.encode_batch([text])
        except TextError as error:
            reasons[index] = error.reason
    documents = documents.without(reasons)
    return documents, tokenizer.encode_batch(documents.texts)


def _without_unusable(job: Job, documents: Documents, batch: TokenBatch) -> tuple[Documents, TokenBatch]:
    """Reject what would put a false end into a document, and with `long_documents: drop` what is too long."""
    tokenizer, largest = job.tokenizer, job.config.edges[-1]
    (false_ends,) = np.nonzero((batch.ids == tokenizer.eos_id) | (batch.ids == tokenizer.bos_id))
    reasons = dict.fromkeys(np.searchsorted(batch.offsets, false_ends, side="right") - 1, HOLDS_SPECIAL)
    if job.config.long_documents == "drop":
        (too_long,) = np.nonzero(np.diff(batch.offsets) + 1 > largest)
        reasons |= dict.fromkeys(too_long, _too_long(job))
    if not reasons:
        return documents, batch
    lengths = np.diff(batch.offsets)
    kept = np.setdiff1d(np.arange(len(batch)), list(reasons))
    ids = gather(batch.ids, batch.offsets[kept], lengths[kept])
    return documents.without({int(index): why for index, why in reasons.items()}), TokenBatch(
        ids=ids, offsets=offsets_of(lengths[kept])
    )


def _too_long(job: Job) -> str:
    return f"longer than {job.config.edges[-1]}"


def _audit_sample(tokenizer: Tokenizer, documents: Documents, batch: TokenBatch, *, budget: int) -> AuditSample:
    """Documents spread over the chunk, of `budget` bytes together; if all are longer, the beginning of the first."""
    chosen: list[int] = []
    count = len(documents.texts)
    step = max(1, count // 64)
    for index in range(0, count, step):
        size = len(documents.texts[index].encode())
        if size <= budget:
            chosen.append(index)
            budget -= size
    if not chosen:
        beginning = documents.texts[0].encode()[:budget].decode(errors="ignore")
        where = f"{documents.files[documents.file_of[0]]}: beginning of row {documents.rows[0]}"
        return AuditSample(where=[where], texts=[beginning], ids=[tokenizer.encode_batch([beginning]).ids])
    return AuditSample(
        where=[f"{documents.files[documents.file_of[index]]}: row {documents.rows[index]}" for index in chosen],
        texts=[documents.texts[index] for index in chosen],
        ids=[batch[index] for index in chosen],
    )


def _json_line(rejection: Rejection) -> bytes:
    return json.dumps(asdict(rejection), ensure_ascii=False).encode() + b"\n"


class _Tally:
    """Sums over the chunks of a unit."""

    def __init__(self, unit: Unit, *, streams: int) -> None:
        self.cut = {part.file.name for part in unit.parts if part.is_cut}
        self.line_counts: dict[str, LineCounts] = {}
        self.documents_read = self.documents = self.text_bytes = self.targets_read = self.targets_cut = 0
        self.rejected: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.counts = np.zeros((streams, 3), np.int64)  # documents, pieces, targets

    def add(self, chunk: _Chunk) -> None:
        self.documents_read += chunk.read
        self.documents += len(chunk.inputs)
        self.text_bytes += chunk.text_bytes
        self.targets_read += int(chunk.inputs.sum())
        self.targets_cut += chunk.targets_cut
        self.rejected.update(rejection.reason for rejection in chunk.rejections)
        of_cut = ((name, counts) for name, counts in chunk.line_counts.items() if name in self.cut)
        self.line_counts = add_counts(itertools.chain(self.line_counts.items(), of_cut))
        bins, counts = np.unique(np.floor(LENGTHS_PER_DOUBLING * np.log2(chunk.inputs)), return_counts=True)
        self.lengths.update(dict(zip(bins.astype(int).tolist(), counts.tolist(), strict=True)))
        columns, bounds = chunk.pieces.columns, chunk.pieces.bounds
        of_each = (columns["starts"] == 0, np.ones_like(columns["starts"]), columns["lengths"] - 1)
        for column, values in enumerate(of_each):
            self.counts[:, column] += np.diff(offsets_of(values)[bounds])

    def record(self, *, source: str, files: dict[str, Any], blocks: list[Block], hash_runs: list[int]) -> UnitRecord:
        return UnitRecord(
            files=files,
            source=source,
            documents_read=self.documents_read,
            documents=self.documents,
            rejected=dict(sorted(self.rejected.items())),
            text_bytes=self.text_bytes,
            targets_read=self.targets_read,
            targets_cut=self.targets_cut,
            streams=[
                StreamCount(documents=documents, pieces=pieces, targets=targets)
                for documents, pieces, targets in self.counts.tolist()
            ],
            blocks=blocks,
            hash_runs=hash_runs,
            lengths=dict(sorted(self.lengths.items())),
            line_counts=self.line_counts,
        )
