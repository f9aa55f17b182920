"""The second step: all pieces of one stream in a window to packs to shards.

A window is a run of blocks of one stream (a bucket of a source in a split) with about `window_tokens` tokens: fixed by
the input, so packing needs bounded memory and windows can be packed in any order. What is lost is the rest of one pack
at the end of each window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.dataset.shard_writer import Pack, Shard, write_shards
from prep.document import mix
from prep.execution.context import Job
from prep.execution.intermediate import COLUMNS, PIECES_NAME, Block, read_block
from prep.execution.task_store import DoneRecord, done_folder, finish, hash_file, load_done, temporary_task_folder
from prep.ragged import gather, offsets_of
from prep.stages.best_fit import assign_best_fit
from prep.stages.deduplication import Duplicates
from prep.stages.tokenization import Report, UnitRecord, unit_name
from streaming_rwkv.config import Config
from streaming_rwkv.shards import Split, bucket_name, stream_path

_GATHER_TOKENS = 1 << 20
FILL_BINS = 20


class Window(Config):
    """A part of one stream that is packed by itself."""

    split: Split
    source: str
    lower: int
    upper: int
    number: int  # within the stream
    blocks: tuple[tuple[int, Block], ...]  # (unit, block)

    @property
    def stream(self) -> str:
        return stream_path(self.split, self.source, bucket_name(self.lower, self.upper))

    @property
    def tokens(self) -> int:
        return sum(block.tokens for _, block in self.blocks)

    @property
    def name(self) -> str:
        return f"windows/{self.stream}/{self.number:06}"


class WindowRecord(DoneRecord):
    """What a window was packed into, and what was left out."""

    documents: int
    pieces: int
    targets: int
    bytes: int
    packs: int
    duplicates: int
    duplicate_targets: int
    shards: list[Shard]
    fill: list[int]  # packs by how full they are, in FILL_BINS steps


def plan_windows(job: Job, units: Sequence[UnitRecord]) -> list[Window]:
    """All windows, stream by stream, in the order of the manifest."""
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
        for index, (split, lower, upper) in enumerate(job.streams)
        for source in sorted(job.config.sources)
        for number, group in enumerate(_by_tokens(blocks[index, source], job.config.window_tokens))
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


def do_window(job: Job, window: Window, report: Report) -> WindowRecord:
    """Pack a window, if that is not done yet."""
    record = load_done(job.work, window.name, WindowRecord)
    if record is None:
        pieces, left_out = _read(job, window)
        packs, fill = _packs(job, window, pieces)
        with temporary_task_folder(job.work) as folder:
            shards = write_shards(packs, folder, form=job.shard_format)
            inputs = pieces.columns["lengths"].astype(np.int64) - 1
            record = WindowRecord(
                files={shard.record.basename: hash_file(folder / shard.record.basename) for shard in shards},
                documents=int((pieces.columns["starts"] == 0).sum()),
                pieces=len(inputs),
                targets=int(inputs.sum()),
                bytes=int(pieces.columns["bytes"].sum(dtype=np.int64)),
                packs=sum(shard.record.packs for shard in shards),
                duplicates=left_out[0],
                duplicate_targets=left_out[1],
                shards=shards,
                fill=fill,
            )
            finish(folder, record, work=job.work, name=window.name)
    return record


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """P pieces of one stream, and their tokens somewhere in `tokens`."""

    columns: dict[str, NDArray[Any]]  # (P,) each
    first_tokens: NDArray[np.int64]  # (P,) where each begins
    tokens: NDArray[Any]


def _read(job: Job, window: Window) -> tuple[_Pieces, tuple[int, int]]:
    """The window's pieces without duplicates, and how many documents and targets those had."""
    tokens = np.empty(window.tokens, job.token_dtype)
    found: list[dict[str, NDArray[Any]]] = []
    repeats: list[NDArray[np.bool_]] = []
    duplicates = Duplicates(job) if job.config.deduplicate == "exact" else None
    at = 0
    for unit, block in window.blocks:
        with (done_folder(job.work, unit_name(job.units[unit])) / PIECES_NAME).open("rb") as file:
            found.append(read_block(file, block, tokens_into=tokens[at : at + block.tokens]))
        at += block.tokens
        documents = found[-1]["documents"]
        repeats.append(duplicates.are_among(documents, unit=unit) if duplicates else np.zeros(len(documents), np.bool_))
    columns = {name: np.concatenate([part[name] for part in found]) for name in COLUMNS}
    first_tokens = offsets_of(columns["lengths"])[:-1]
    is_repeat = np.concatenate(repeats)
    left_out = (
        int((is_repeat & (columns["starts"] == 0)).sum()),
        int((columns["lengths"][is_repeat].astype(np.int64) - 1).sum()),
    )
    kept = {name: column[~is_repeat] for name, column in columns.items()}
    return _Pieces(columns=kept, first_tokens=first_tokens[~is_repeat], tokens=tokens), left_out


def _packs(job: Job, window: Window, pieces: _Pieces) -> tuple[Iterator[Pack], list[int]]:
    """The packs in seeded order, and how full they are."""
    lengths = pieces.columns["lengths"].astype(np.int64)
    pack_of, count = assign_best_fit(lengths - 1, capacity=job.config.pack_tokens)
    inputs = np.bincount(pack_of, weights=lengths - 1, minlength=count)
    steps = np.minimum((inputs * FILL_BINS / job.config.pack_tokens).astype(np.int64), FILL_BINS - 1)
    rank = np.argsort(np.argsort(mix(np.arange(count, dtype=np.uint64), seed=_order_seed(job, window)), kind="stable"))
    order = np.argsort(rank[pack_of], kind="stable")
    bounds = offsets_of(np.bincount(rank[pack_of], minlength=count))
    return _gather_packs(pieces, order, bounds), np.bincount(steps, minlength=FILL_BINS).tolist()


def _order_seed(job: Job, window: Window) -> int:
    return xxhash.xxh3_64_intdigest(f"{job.config.seed}\0{window.stream}\0{window.number}")


def _gather_packs(pieces: _Pieces, order: NDArray[np.int64], bounds: NDArray[np.int64]) -> Iterator[Pack]:
    """Packs of the pieces `order[bounds[i]:bounds[i + 1]]`, gathered some at a time."""
    lengths = pieces.columns["lengths"].astype(np.int64)[order]
    first_tokens = pieces.first_tokens[order]
    token_bounds = offsets_of(lengths)[bounds]
    columns = {name: pieces.columns[name][order] for name in ("bytes", "keys", "lengths", "starts")}
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
            yield {**{name: column[within] for name, column in columns.items()}, "tokens": tokens[begin:end]}
        first = last
