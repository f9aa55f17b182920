"""The first stage: a unit of input to tokenized pieces, sorted by stream.

texts ─ tokenizer ─▶ ids ─ bos, eos ─▶ stored tokens ─ cut ─▶ pieces ─ sort by stream ─▶ blocks
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prep.dataset.names import REJECTED_NAME
from prep.document import Documents, Rejection, content_hashes, in_validation
from prep.execution.context import BuildContext, unit_task
from prep.execution.intermediate import (
    HASHES_NAME,
    PIECES_NAME,
    Block,
    HashedFile,
    SortedPieces,
    write_blocks,
    write_hashes,
)
from prep.execution.observer import Observer, TokenizationProgress
from prep.execution.steps import run_step
from prep.execution.task_store import finish, load_done, temporary_task_folder
from prep.execution.tasks import Report, Run
from prep.execution.work_folder import mark_audited
from prep.inputs.faults import InputError, Reasons
from prep.inputs.files import Unit
from prep.inputs.readers import CutFiles, nothing_in, read_unit
from prep.ngrams import CONTAMINATED
from prep.ragged import gather
from prep.stages import buckets
from prep.stages.audit import sample_for_audit
from prep.stages.records import UnitRecord
from prep.stages.unit_counts import TokenizedChunk, UnitCounter
from streaming_rwkv.shards import offsets_of
from streaming_rwkv.tokenizer import TextError, TokenBatch, Tokenizer

HOLDS_SPECIAL = "text encodes to bos or eos"

# Pieces are written in stretches of about this number of tokens: few blocks, bounded memory.
_STRETCH_TOKENS = 4 << 20
_REJECTIONS_REPORTED = 5  # of each reason, while the unit is tokenized; rejected.jsonl lists all of them


def tokenize(context: BuildContext, run: Run, observer: Observer) -> list[UnitRecord]:
    """Tokenize all units."""
    cut_files, reasons = CutFiles(context.units), Reasons()

    def on_unit(index: int, record: UnitRecord) -> None:
        unit = context.units[index]
        cut_files.has_read(unit, record.line_counts)
        reasons.add(unit.source, record.rejected)
        if context.audit_bytes(unit):  # a unit's reports come before its result
            mark_audited(context, unit)

    sizes = [(unit.source, unit.input_bytes) for unit in context.units]
    units = run_step(
        "tokenizing", run, tokenize_unit, context.units, sizes, observer, on_unit, in_bytes=True, are_reported=True
    )
    check_not_empty(context, units)
    return units


def count_tokens(context: BuildContext, run: Run, observer: Observer) -> list[UnitRecord]:
    """Tokenize all units for their counts only, without writing anything."""
    cut_files, reasons = CutFiles(context.units), Reasons()
    sizes = [(unit.source, unit.input_bytes) for unit in context.units]

    def on_unit(index: int, record: UnitRecord) -> None:
        cut_files.has_read(context.units[index], record.line_counts)
        reasons.add(record.source, record.rejected)

    return run_step(
        "counting", run, count_unit, context.units, sizes, observer, on_unit, in_bytes=True, are_reported=True
    )


def tokenize_unit(context: BuildContext, unit: Unit, report: Report) -> UnitRecord:
    """Tokenize a unit unless that is done already, and return its record.

    Raises:
        InputError: a broken file, or a broken document with `on_error: stop`.
    """
    task = unit_task(unit)
    record = load_done(context.work_folder, task, UnitRecord)
    if record is not None:
        report(_progress(unit, input_bytes=unit.input_bytes))
    else:
        with temporary_task_folder(context.work_folder) as folder:
            record = _write_unit(context, unit, folder=folder, report=report)
            finish(folder, record, work=context.work_folder, name=task)
    return record


def count_unit(context: BuildContext, unit: Unit, report: Report) -> UnitRecord:
    """Tokenize a unit for its counts only, without writing anything."""
    counter = UnitCounter(unit, streams=len(context.streams))
    for chunk in _chunks(context, unit, report=report):
        counter.add(chunk)
    return counter.record(files={}, blocks=[], hash_runs=[])


def check_not_empty(context: BuildContext, units: Sequence[UnitRecord]) -> None:
    """Check that each source has documents that were not rejected.

    Raises:
        UserError: it has none.
    """
    for source, config in context.config.sources.items():
        of_source = [unit for unit in units if unit.source == source]
        if not sum(unit.documents for unit in of_source):
            rejected = sum((Counter(unit.rejected) for unit in of_source), Counter[str]())
            raise nothing_in(source, config, rejected=rejected)


def _write_unit(context: BuildContext, unit: Unit, *, folder: Path, report: Report) -> UnitRecord:
    """Tokenize, cut and sort one unit into `folder`."""
    counter = UnitCounter(unit, streams=len(context.streams))
    blocks: list[Block] = []
    hash_runs: list[int] = []
    with ExitStack() as stack:
        pieces_file, hashes_file, rejected_file = (
            stack.enter_context(HashedFile(folder / name)) for name in (PIECES_NAME, HASHES_NAME, REJECTED_NAME)
        )
        stretch: list[TokenizedChunk] = []

        def write_stretch() -> None:
            blocks.extend(write_blocks([chunk.pieces for chunk in stretch], pieces_file))
            if stretch and context.config.deduplicate == "exact":
                hashes = np.concatenate([chunk.hashes for chunk in stretch])
                numbers = np.arange(stretch[0].first, stretch[0].first + len(hashes), dtype=np.uint32)
                hash_runs.append(write_hashes(hashes, numbers, hashes_file))
            stretch.clear()

        for chunk in _chunks(context, unit, report=report):
            counter.add(chunk)
            rejected_file.write(b"".join(_json_line(rejection) for rejection in chunk.rejections))
            stretch.append(chunk)
            if sum(len(chunk.pieces.tokens) for chunk in stretch) >= _STRETCH_TOKENS:
                write_stretch()
        write_stretch()
        files = {file.name: file.record() for file in (pieces_file, hashes_file, rejected_file)}
    return counter.record(files=files, blocks=blocks, hash_runs=hash_runs)


def _chunks(context: BuildContext, unit: Unit, *, report: Report) -> Iterator[TokenizedChunk]:
    """Read the unit's documents, and tokenize, cut and sort them by stream."""
    first = 0
    seen: Counter[str] = Counter()
    reasons = Reasons()
    audit_bytes = context.audit_bytes(unit)
    unreported = unit.input_bytes
    for documents in read_unit(unit, context.config.sources[unit.source], tokenizer=context.tokenizer):
        if context.evaluation is not None:
            found = dict.fromkeys(context.evaluation.contaminated(documents.texts), CONTAMINATED)
            documents = documents.without(found, is_requested=True) if found else documents
        documents, batch = _encoded(context.tokenizer, documents)
        if audit_bytes and documents.texts:
            report(sample_for_audit(context.tokenizer, documents, batch, budget=audit_bytes))
            audit_bytes = 0
        documents, batch = _without_unusable(context, documents, batch)
        for rejection in documents.rejections:
            if context.config.on_error == "stop" and not rejection.is_requested:
                raise InputError(
                    f"{rejection}; fix it, or set on_error=skip to leave such documents out and count them"
                )
            seen[rejection.reason] += 1
            if seen[rejection.reason] <= _REJECTIONS_REPORTED:
                report(rejection)
        reasons.add(unit.source, seen)  # a unit may have many files
        chunk = _chunk(context, documents, batch, first=first)
        first += len(batch)
        input_bytes = min(unreported, documents.input_bytes)
        unreported -= input_bytes
        report(_progress(unit, input_bytes=input_bytes, chunk=chunk))
        yield chunk
    report(_progress(unit, input_bytes=unreported))


def _progress(unit: Unit, *, input_bytes: int, chunk: TokenizedChunk | None = None) -> TokenizationProgress:
    return TokenizationProgress(
        source=unit.source,
        documents=chunk.read if chunk else 0,
        text_bytes=chunk.text_bytes if chunk else 0,
        tokens=int(chunk.inputs.sum()) if chunk else 0,
        input_bytes=input_bytes,
    )


def _chunk(context: BuildContext, documents: Documents, batch: TokenBatch, *, first: int) -> TokenizedChunk:
    config, tokenizer = context.config, context.tokenizer
    encoded = [text.encode() for text in documents.texts]
    text_bytes = np.fromiter(map(len, encoded), np.int64, count=len(encoded))
    hashes = content_hashes(encoded, seed=config.split_seed)
    tokens, offsets = buckets.stored_tokens(
        batch, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=context.token_dtype
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
    return TokenizedChunk(
        first=first,
        pieces=SortedPieces(
            bounds=offsets_of(np.bincount(stream, minlength=len(context.streams))),
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
    """Encode the texts; documents that the tokenizer cannot encode are rejected for its reason."""
    try:
        return documents, tokenizer.encode_batch(documents.texts)
    except TextError:  # find out which texts are at fault
        pass
    reasons: dict[int, str] = {}
    for index, text in enumerate(documents.texts):
        try:
            tokenizer.encode_batch([text])
        except TextError as error:
            reasons[index] = error.reason
    documents = documents.without(reasons)
    return documents, tokenizer.encode_batch(documents.texts)


def _without_unusable(context: BuildContext, documents: Documents, batch: TokenBatch) -> tuple[Documents, TokenBatch]:
    """Reject documents with a false end inside and, with `long_documents: drop`, those that are too long."""
    tokenizer, largest = context.tokenizer, context.config.edges[-1]
    if context.config.long_documents == "drop":
        (too_long,) = np.nonzero(np.diff(batch.offsets) + 1 > largest)
        documents, batch = _without(documents, batch, too_long, f"longer than {largest}", is_requested=True)
    (false_ends,) = np.nonzero((batch.ids == tokenizer.eos_id) | (batch.ids == tokenizer.bos_id))
    special = np.unique(np.searchsorted(batch.offsets, false_ends, side="right") - 1)
    return _without(documents, batch, special, HOLDS_SPECIAL, is_requested=False)


def _without(
    documents: Documents, batch: TokenBatch, rejected: NDArray[np.int64], reason: str, *, is_requested: bool
) -> tuple[Documents, TokenBatch]:
    if not len(rejected):
        return documents, batch
    lengths = np.diff(batch.offsets)
    kept = np.setdiff1d(np.arange(len(batch)), rejected)
    ids = gather(batch.ids, batch.offsets[kept], lengths[kept])
    documents = documents.without(dict.fromkeys(rejected.tolist(), reason), is_requested=is_requested)
    return documents, TokenBatch(ids=ids, offsets=offsets_of(lengths[kept]))


def _json_line(rejection: Rejection) -> bytes:
    values = {name: getattr(rejection, name) for name in ("source", "file", "row", "reason")}
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
