"""The dry run of `build`: counts of documents and tokens, without writing anything."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from prep.commands.tables import FEW_DOCUMENTS, Format, grouped, number_table, rejected_cell, with_rows
from prep.config import PrepConfig
from prep.dataset.finished import find_local_manifest
from prep.execution.context import BuildContext
from prep.execution.engine import start
from prep.execution.observer import Observer
from prep.execution.resume import BuildState, build_state, check_resumable
from prep.execution.task_store import check_can_be_locked
from prep.execution.work_folder import check_folder, save_tokenizer
from prep.inputs.decontamination import read_evaluation
from prep.inputs.text_keys import check_text_keys
from prep.inputs.units import find_sources, plan_units
from prep.stages.audit import AuditError, report_handler, warn_of_reference
from prep.stages.records import UnitRecord
from prep.stages.tokenization import check_not_empty, count_tokens
from streaming_rwkv.console import shown_bytes, shown_duration
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import SPLITS, bucket_bounds, bucket_name
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

# Bytes of a shard for each token of 2 and of 4 bytes, and the time of a whole build beside that of tokenization alone,
# measured on English, Chinese and code.
_SHARD_BYTES = {2: 1.1, 4: 1.3}
_WORK_BYTES = 5  # for each token while the build runs, beside the shards
_BUILD_TO_COUNT = 1.2


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a dry run has counted."""

    records: list[UnitRecord]
    token_bytes: int  # of a stored token


def count(config: PrepConfig, *, observer: Observer | None = None, accept_changes: bool = False) -> Counts:
    """Count what `build` would read and tokenize, duplicates included, without writing anything.

    Args:
        observer, accept_changes: as for `build`.
    Raises:
        UserError: the same errors of the input, and of a local place to write to, as from `build`.
    """
    observer = observer or Observer()
    check_folder(config)
    files = find_sources(config.sources)
    observer.inputs(files, config)
    check_text_keys(config.sources, files)
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    _check_place(build_state(config, tokenizer.record(), files), accept_changes=accept_changes)
    units = plan_units(config.sources, unit_bytes=config.unit_bytes, files=files)
    with tempfile.TemporaryDirectory() as folder:
        # Workers load the tokenizer from the data set's folder. This folder is temporary, and only this machine has it.
        context = BuildContext(
            config=config.model_copy(update={"out": folder, "work": None, "engine": "processes"}),
            units=units,
            vocab_size=tokenizer.vocab_size,
            loaded_tokenizer=tokenizer,
            evaluation=read_evaluation(config.decontaminate) if config.decontaminate else None,
        )
        save_tokenizer(tokenizer, context)
        try:
            records = _count(context, tokenizer, observer)
        except AuditError as error:
            warn_of_reference(error)
            records = _count(replace(context, by_reference=True), tokenizer, observer)
    check_not_empty(context, records)
    return Counts(records=records, token_bytes=context.token_dtype(0).itemsize)


def _check_place(state: BuildState, *, accept_changes: bool) -> None:
    """Refuse a place where `build` would not start; object storage is not asked."""
    config = state.config
    if not is_remote(config.out):
        check_resumable(state, manifest=find_local_manifest(config.folder), accept_changes=accept_changes)
    check_can_be_locked(config.folder)


def _count(context: BuildContext, tokenizer: Tokenizer, observer: Observer) -> list[UnitRecord]:
    with start(context, on_report=report_handler(observer, tokenizer)) as run:
        return count_tokens(context, run, observer)


def count_table(
    records: Sequence[UnitRecord], config: PrepConfig, *, by: str = "source", number: Format = grouped
) -> Table:
    """Return a table of a dry run's counts, duplicates included.

    Args:
        by: `source` for a row for each source, `bucket` for a row for each bucket of each source.
    """
    buckets = [bucket_name(*bounds) for bounds in bucket_bounds(config.edges)]
    has_buckets, has_rejected = by == "bucket", any(record.rejected for record in records)
    table = number_table(
        "dry run: nothing was written; duplicates are included",
        names=["source", *(["bucket"] if has_buckets else [])],
        numbers=["documents", "tokens", "text", "packs", "validation"],
        texts=["rejected"] if has_rejected else [],
    )

    def cells(name: list[str], of: Sequence[UnitRecord], bucket: int | None = None) -> list[str]:
        counts = np.array([record.streams for record in of], np.int64).reshape(-1, len(SPLITS), len(buckets), 3).sum(0)
        text = shown_bytes(sum(record.text_bytes for record in of))
        if bucket is not None:
            counts, text = counts[:, bucket : bucket + 1], ""
        documents, _, tokens = counts.sum(axis=(0, 1)).tolist()
        of_validation = int(counts[SPLITS.index("validation"), :, 2].sum())
        numbers = [number(documents), number(tokens), text, number(_packs(counts, config)), number(of_validation)]
        return [
            *name[: 1 + has_buckets],
            *numbers,
            *([_rejected(of) if bucket is None else ""] if has_rejected else []),
        ]

    rows: list[list[str]] = []
    for source, members in itertools.groupby(records, key=lambda record: record.source):
        of_source = list(members)
        if has_buckets:
            of_buckets = [cells([source, name], of_source, bucket) for bucket, name in enumerate(buckets)]
            rows += [row for row in of_buckets if row[3] != "0"]
        rows += [cells([source, "all"], of_source), *([[]] if has_buckets else [])]
    return with_rows(table, [*rows, *([] if has_buckets else [[]]), cells(["all", ""], records)])


def _rejected(records: Sequence[UnitRecord]) -> str:
    rejected = sum((Counter(record.rejected) for record in records), Counter[str]())
    return rejected_cell(dict(sorted(rejected.items())))


def _packs(counts: NDArray[np.int64], config: PrepConfig) -> int:
    """Return the least number of packs; the build needs some percent more."""
    return int(np.ceil(counts[..., 2] / config.pack_tokens).sum())


def estimate(counts: Counts, config: PrepConfig, *, seconds: float) -> list[str]:
    """Return what a build would take, what is odd about the data, and the next command, in a line each.

    Args:
        seconds: the time that counting took.
    """
    documents, pieces, tokens = np.array([record.streams for record in counts.records]).sum(axis=(0, 1)).tolist()
    text_bytes = sum(record.text_bytes for record in counts.records)
    shards = _SHARD_BYTES[counts.token_bytes] * (tokens + pieces)
    lines = [
        f"a build writes about {shown_bytes(shards)} of shards, needs about {shown_bytes(_WORK_BYTES * tokens)} more "
        f"while it runs, and takes about {shown_duration(_BUILD_TO_COUNT * seconds)} with {config.worker_count} "
        f"workers; {text_bytes / max(1, tokens):.2f} bytes of text per token"
    ]
    if documents < FEW_DOCUMENTS:
        lines.append(
            f"warning: {documents:,} documents of {tokens:,} tokens: enough to try the commands, not to train a model"
        )
    lines.append("next: the same command without --dry-run")
    return lines
