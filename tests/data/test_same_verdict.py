"""`prep verify` and training accept exactly the same data sets."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from prep.dataset.shard_writer import ShardFormat, index_bytes, write_shards
from prep.dataset.verification import verify
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, evaluation_batches
from streaming_rwkv.data.shard_set import check_shards, copy_tokenizer, open_shard_set
from streaming_rwkv.errors import UserError
from streaming_rwkv.shards import SPLITS, columns
from tests.fuzz import SmallSet, mutated_shard
from tests.mutations import mutated_json
from tests.small_data import VOCAB_SIZE, pack_of

RANDOM_CASES = 20  # of each kind


@pytest.fixture
def data(tmp_path: Path) -> SmallSet:
    return SmallSet(folder=tmp_path / "data")


def read_for_training(folder: Path, cache: Path) -> None:
    """Do what a run does with a data set before and while it uses each pack once."""
    shutil.rmtree(cache, ignore_errors=True)
    shard_set = open_shard_set(folder, cache=cache / "shards", splits=SPLITS, timeout_seconds=20, fetch=True)
    assert shard_set.lock is not None
    try:
        copy_tokenizer(shard_set, cache / "run" / "tokenizer")
        check_shards(shard_set, shard_set.manifest.streams)
        for split in SPLITS:
            if records := shard_set.manifest.select(split):
                batches, number = evaluation_batches([record.packs for record in records], batch_packs=1)
                options = LoaderOptions(download_attempts=1, timeout_seconds=20)
                dataset = PackDataset(
                    shard_set, records, batches=batches, num_batches=number, batch_packs=1, options=options
                )
                try:
                    assert sum(1 for _ in dataset) == sum(record.packs for record in records)
                finally:
                    dataset.close()
    finally:
        shard_set.lock.release()


def verdicts(folder: Path, cache: Path) -> tuple[str, str]:
    """Return the errors of `verify` and of training; '' where the data set is accepted."""
    found = []
    for read in (lambda: verify(folder), lambda: read_for_training(folder, cache)):
        try:
            read()
            found.append("")
        except UserError as error:
            found.append(str(error) or "an error without a text")
    return found[0], found[1]


def test_a_whole_data_set_is_accepted(data: SmallSet, tmp_path: Path) -> None:
    assert verdicts(data.folder, tmp_path / "cache") == ("", "")


def with_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[SmallSet], None]:
    """Return a change of one column of the first pack; the shard, index and manifest are written to match."""

    def apply(data: SmallSet) -> None:
        packs = [pack_of(0, i, lower=1, upper=16) for i in range(6)]
        packs[0][name] = change(packs[0][name])
        rewrite(data, packs, data.form)

    return apply


def rewrite(data: SmallSet, packs: list[Any], form: ShardFormat) -> None:
    shards = write_shards(packs, data.shard.parent, form=form)
    data.replace_index(index_bytes(shards, form=form), shards=[shard.model_dump() for shard in shards])


def with_columns(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[SmallSet], None]:
    """Return a change of the columns of all packs of the first stream."""

    def apply(data: SmallSet) -> None:
        packs = [pack_of(0, i, lower=1, upper=16) for i in range(6)]
        named = change(columns(VOCAB_SIZE))
        written = [
            {name: pack.get(name, pack["lengths"]).astype(kind.split(":")[1]) for name, kind in named.items()}
            for pack in packs
        ]
        rewrite(data, written, ShardFormat(columns=named, compression_level=1, shard_bytes=2000))

    return apply


def with_manifest(path: str, value: Any) -> Callable[[SmallSet], None]:
    """Return a change of one field of the manifest."""

    def apply(data: SmallSet) -> None:
        values = json.loads(data.manifest.to_json())
        *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = values
        for part in folders:
            place = place[part]
        place[last] = value(place[last]) if callable(value) else value
        data.restore(json.dumps(values).encode())

    return apply


def with_frame(change: Callable[[bytes], bytes]) -> Callable[[SmallSet], None]:
    """Return a change of the compressed bytes of a shard."""

    def apply(data: SmallSet) -> None:
        compressed = data.shard.read_bytes()
        data.replace_shard(change(compressed), zstandard.ZstdDecompressor().decompress(compressed))

    return apply


def with_index(old: bytes, new: bytes) -> Callable[[SmallSet], None]:
    """Return a change of the index's text; the manifest has its hash."""

    def apply(data: SmallSet) -> None:
        content = (data.shard.parent / "index.json").read_bytes()
        assert old in content
        data.replace_index(content.replace(old, new))

    return apply


WRONG = {
    "starts say that no document begins": with_column("starts", lambda starts: starts + 1),
    "a byte more than the stream": with_column("bytes", lambda sizes: sizes + np.uint32(1)),
    "fewer keys than pieces": with_column("keys", lambda keys: keys[:-1]),
    "an id beyond the vocabulary": with_column("tokens", lambda tokens: tokens + np.uint16(97) * (tokens > 0)),
    "no bos": with_column("tokens", lambda tokens: np.maximum(tokens, 1)),
    "lengths that do not add up": with_column("lengths", lambda lengths: lengths + np.uint32(1)),
    "tokens of another type": with_columns(lambda names: names | {"tokens": "ndarray:uint32"}),
    "lengths of another type": with_columns(lambda names: names | {"lengths": "ndarray:int32"}),
    "a column that is missing": with_columns(lambda names: {name: names[name] for name in names if name != "keys"}),
    "a column more": with_columns(lambda names: names | {"more": "ndarray:uint32"}),
    "bytes after the frame": with_frame(lambda content: content + b"more"),
    "a frame after the frame": with_frame(lambda content: content * 2),
    "a skippable frame first": with_frame(lambda content: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + content),
    "an index with an unknown field": with_index(b'"samples"', b'"more": 1, "samples"'),
    "an index with fixed sizes": with_index(b'"column_sizes": [null, null', b'"column_sizes": [4, null'),
    "an index with another compression": with_index(b'"zstd:1"', b'"gz:1"'),
    "an index with another version": with_index(b'"version": 2}', b'"version": 3}'),
    "more documents than the stream has": with_manifest("streams.0.documents", lambda count: count + 1),
    "more targets than the stream has": with_manifest("streams.0.targets", lambda count: count + 1),
    "more bytes than the stream has": with_manifest("streams.0.bytes", lambda count: count + 1),
    "more pieces than the stream has": with_manifest("streams.0.pieces", lambda count: count + 1),
    "counts that do not balance": with_manifest("counts.web.duplicates", 1),
    "a source without counts": with_manifest("counts", {}),
    "a bucket that is none of the edges": with_manifest("edges", [8, 16]),
    "another bos": with_manifest("tokenizer.bos_id", 1),
    "another eos": with_manifest("tokenizer.eos_id", 1),
    "a larger vocabulary": with_manifest("tokenizer.vocab_size", 98),
    "another name of the tokenizer": with_manifest("tokenizer.name", "other"),
    "another hash of the raw bytes": with_manifest("streams.0.shards.0.raw_sha256", "0" * 64),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_data_set_is_refused_by_both(
    change: Callable[[SmallSet], None], data: SmallSet, tmp_path: Path
) -> None:
    change(data)
    by_verify, by_training = verdicts(data.folder, tmp_path / "cache")
    assert by_verify
    assert by_training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["manifest", "index", "shard"])
def test_mutated_data_sets_have_the_same_verdict(kind: str, tmp_path: Path) -> None:
    whole = SmallSet(folder=tmp_path / "whole")
    manifest = json.loads(whole.manifest.to_json())
    index = json.loads((whole.shard.parent / "index.json").read_bytes())
    compressed = whole.shard.read_bytes()
    raw = zstandard.ZstdDecompressor().decompress(compressed)
    differing = {}
    for number in range(RANDOM_CASES):
        rng = random.Random(f"{kind} {number}")
        match kind:
            case "manifest":
                whole.restore(mutated_json(manifest, rng))
            case "index":
                whole.replace_index(mutated_json(index, rng))
            case _:
                whole.replace_shard(*mutated_shard(compressed, raw, rng))
        by_verify, by_training = verdicts(whole.folder, tmp_path / "cache")
        if bool(by_verify) != bool(by_training):
            differing[number] = by_verify or by_training
    assert differing == {}
