"""The third stage: the pieces of a window to packs, and packs to shards.

A window is a run of blocks of one stream (a bucket of a source in a split) with about `window_tokens` tokens: fixed by
the input, so packing needs bounded memory and windows can be packed in any order. The cost is one partly filled pack at
the end of each window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.dataset.shard_writer import Pack, ShardFormat, write_shards
from prep.document import mix
from prep.execution.context import BuildContext, unit_task
from prep.execution.intermediate import COLUMNS, DUPLICATES_TASK, PIECES_NAME, Block, Duplicates, read_block
from prep.execution.task_store import done_folder, finish, hash_file, load_done, temporary_task_folder
from prep.execution.tasks import Report
from prep.ragged import gather
from prep.stages.best_fit import assign_best_fit
from prep.stages.records import FILL_BINS, UnitRecord, Window, WindowRecord
from streaming_rwkv.shards import columns, offsets_of

_GATHER_TOKENS = 1 << 20


def plan_windows(context: BuildContext, units: Sequence[UnitRecord]) -> list[Window]:
    """Divide the pieces of all units into windows, stream by stream in the order of the manifest."""
    blocks: defaultdict[tuple[int, str], list[tuple[int, Block]]] = defaultdict(list)
    for number, unit in enumerate(units):
        for block in unit.blocks:
            blocks[block.stream, unit.source].append((number, block))
    return [
        Window(
            split=split,
            source=source,
            lower=lower,
            upper=upper,
            number=number,
            blocks=tuple(group),
        )
        for index, (split, lower, upper) in enumerate(context.streams)
        for source in sorted(context.config.sources)
        for number, group in enumerate(_by_tokens(blocks[index, source], context.config.window_tokens))
    ]


def _by_tokens(blocks: list[tuple[int, Block]], limit: int) -> Iterator[list[tuple[int, Block]]]:
    group: list[tuple[int, Block]] = []
    tokens = 0
    for unit, block in blocks:
        if group and tokens + block.tokens > limit:
            yield group
            group, tokens = [], 0
        group.append((unit, block))
        tokens += block.tokens
    if group:
        yield group


def shard_format(context: BuildContext) -> ShardFormat:
    """Return the format of all shards of a build."""
    return ShardFormat(
        columns=columns(context.vocab_size),
        compression_level=context.config.compression_level,
        shard_bytes=context.config.shard_bytes,
    )


def pack_window(context: BuildContext, window: Window, report: Report) -> WindowRecord:
    """Pack a window unless that is done already, and return its record."""
    record = load_done(context.work_folder, window.task, WindowRecord)
    if record is None:
        pieces, left_out = _read(context, window)
        packs, fill = _packs(context, window, pieces)
        with temporary_task_folder(context.work_folder) as folder:
            shards = write_shards(packs, folder, form=shard_format(context))
            inputs = pieces.columns["lengths"].astype(np.int64) - 1
            record = WindowRecord(
                files={shard.basename: hash_file(folder / shard.basename) for shard in shards},
                documents=int((pieces.columns["starts"] == 0).sum()),
                pieces=len(inputs),
                targets=int(inputs.sum()),
                bytes=int(pieces.columns["bytes"].sum(dtype=np.int64)),
                packs=sum(shard.packs for shard in shards),
                duplicates=left_out[0],
                duplicate_targets=left_out[1],
                shards=shards,
                fill=fill,
            )
            finish(folder, record, work=context.work_folder, name=window.task)
    return record


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """P pieces of one stream; their tokens are in `tokens`, among others."""

    columns: dict[str, NDArray[Any]]  # (P,) each
    first_tokens: NDArray[np.int64]  # (P,) index of each one's first token
    tokens: NDArray[Any]


def _read(context: BuildContext, window: Window) -> tuple[_Pieces, tuple[int, int]]:
    """Read the window's pieces without duplicates, and count the documents and targets of the duplicates."""
    tokens = np.empty(window.tokens, context.token_dtype)
    found: list[dict[str, NDArray[Any]]] = []
    repeats: list[NDArray[np.bool_]] = []
    duplicates = (
        Duplicates(done_folder(context.work_folder, DUPLICATES_TASK)) if context.config.deduplicate == "exact" else None
    )
    at = 0
    for unit, block in window.blocks:
        with (done_folder(context.work_folder, unit_task(context.units[unit])) / PIECES_NAME).open("rb") as file:
            found.append(read_block(file, block, tokens_into=tokens[at : at + block.tokens]))
        at += block.tokens
        documents = found[-1]["documents"]
        repeats.append(duplicates.are_among(documents, unit=unit) if duplicates else np.zeros(len(documents), np.bool_))
    found_columns = {name: np.concatenate([part[name] for part in found]) for name in COLUMNS}
    first_tokens = offsets_of(found_columns["lengths"])[:-1]
    is_repeat = np.concatenate(repeats)
    left_out = (
        int((is_repeat & (found_columns["starts"] == 0)).sum()),
        int((found_columns["lengths"][is_repeat].astype(np.int64) - 1).sum()),
    )
    kept = {name: column[~is_repeat] for name, column in found_columns.items()}
    return _Pieces(columns=kept, first_tokens=first_tokens[~is_repeat], tokens=tokens), left_out


def _packs(context: BuildContext, window: Window, pieces: _Pieces) -> tuple[Iterator[Pack], list[int]]:
    """Pack the pieces; returns the packs in seeded order, and their number in each of FILL_BINS steps of fill."""
    lengths = pieces.columns["lengths"].astype(np.int64)
    pack_of, count = assign_best_fit(lengths - 1, capacity=context.config.pack_tokens)
    inputs = np.bincount(pack_of, weights=lengths - 1, minlength=count)
    steps = np.minimum((inputs * FILL_BINS / context.config.pack_tokens).astype(np.int64), FILL_BINS - 1)
    rank = np.argsort(
        np.argsort(mix(np.arange(count, dtype=np.uint64), seed=_order_seed(context, window)), kind="stable")
    )
    order = np.argsort(rank[pack_of], kind="stable")
    bounds = offsets_of(np.bincount(rank[pack_of], minlength=count))
    return _gather_packs(pieces, order, bounds), np.bincount(steps, minlength=FILL_BINS).tolist()


def _order_seed(context: BuildContext, window: Window) -> int:
    return xxhash.xxh3_64_intdigest(f"{context.config.seed}\0{window.stream}\0{window.number}".encode())


def _gather_packs(pieces: _Pieces, order: NDArray[np.int64], bounds: NDArray[np.int64]) -> Iterator[Pack]:
    """Yield packs of the pieces `order[bounds[i]:bounds[i + 1]]`, gathering the tokens of several packs at a time."""
    lengths = pieces.columns["lengths"].astype(np.int64)[order]
    first_tokens = pieces.first_tokens[order]
    token_bounds = offsets_of(lengths)[bounds]
    per_piece = {name: pieces.columns[name][order] for name in ("bytes", "keys", "lengths", "starts")}
    first = 0
    while first < len(bounds) - 1:
        last = max(
            first + 1, int(np.searchsorted(token_bounds, token_bounds[first] + _GATHER_TOKENS, side="right")) - 1
        )
        rows = slice(bounds[first], bounds[last])
        tokens = gather(pieces.tokens, first_tokens[rows], lengths[rows])
        for pack in range(first, last):
            within = slice(bounds[pack], bounds[pack + 1])
            begin, end = token_bounds[pack : pack + 2] - token_bounds[first]
            yield {**{name: column[within] for name, column in per_piece.items()}, "tokens": tokens[begin:end]}
        first = last
