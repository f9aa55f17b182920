"""Verification of every byte of a data set against its manifest, and of every pack against the contract."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prep.dataset.finished import DataSet, check_file, open_data_set
from prep.dataset.shard_reader import read_raw
from prep.execution.observer import Observer
from streaming_rwkv.mds import Counts, check_index, check_raw_hash, check_shard, check_totals
from streaming_rwkv.shards import (
    INDEX_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    StreamRecord,
    read_manifest,
    read_small_file,
)
from streaming_rwkv.tokenizer import load_tokenizer_of


def verify(out: str | Path) -> Manifest:
    """Read and check a whole data set, and return its manifest.

        verify("shards").fingerprint

    Args:
        out: a folder, or s3://bucket/path, from which a few shards are fetched at a time.
    Raises:
        DataError: a file is missing or changed, a pack breaks the contract, counts do not add up, or the tokenizer is
            not the manifest's.
        StorageError: an object is changed, or the server fails.
    """
    with open_data_set(out) as data_set:
        manifest = data_set.manifest()
        data_set.tokenizer(manifest)  # raises if it is another
        for stream in manifest.streams:
            _verify_stream(data_set, stream, manifest)
    return manifest


def verify_hashes(out: str | Path, *, observer: Observer) -> Manifest:
    """Check the hashes of all files of a local data set, without reading packs, and return its manifest.

    Raises:
        DataError: a file is missing or changed, or the tokenizer is not the manifest's.
    """
    out = Path(out)
    manifest = read_manifest(out)
    load_tokenizer_of(manifest, out / TOKENIZER_FOLDER)  # raises if it is another
    for stream in manifest.streams:
        check_file(out / stream.path / INDEX_NAME, stream.index_sha256)
    shards = [(stream, shard) for stream in manifest.streams for shard in stream.shards]
    totals: Counter[str] = Counter()
    for stream, shard in shards:
        totals[stream.source] += shard.bytes
    observer.step("verifying", totals=totals, in_bytes=True)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        checks = pool.map(lambda pair: check_file(out / pair[0].path / pair[1].basename, pair[1].sha256), shards)
        for (stream, shard), _ in zip(shards, checks, strict=True):
            observer.done(stream.source, shard.bytes)
    return manifest


def _verify_stream(data_set: DataSet, stream: StreamRecord, manifest: Manifest) -> None:
    folder = f"{data_set.location}/{stream.path}"
    for index in data_set.files([(f"{stream.path}/{INDEX_NAME}", stream.index_sha256)]):
        check_index(
            read_small_file(index), stream, vocab_size=manifest.tokenizer.vocab_size, where=f"{folder}/{INDEX_NAME}"
        )
    found = Counts()
    names = [(f"{stream.path}/{shard.basename}", shard.sha256) for shard in stream.shards]
    for shard, file in zip(stream.shards, data_set.files(names), strict=True):
        where = f"{folder}/{shard.basename}"
        raw = read_raw(file, shard, where=where)
        check_raw_hash(raw, shard, where=where)
        found = found.plus(check_shard(raw, shard, stream, manifest, where=where))
    check_totals(found, stream, where=folder)
