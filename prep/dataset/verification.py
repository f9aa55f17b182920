"""Verification of every byte of a data set against its manifest, and of every pack against the contract."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prep.dataset.finished import DataSet, check_file, open_data_set
from prep.dataset.shard_reader import read_shard
from prep.execution.observer import Observer
from streaming_rwkv.shards import (
    INDEX_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    StreamRecord,
    check_index,
    check_pack,
    offsets_of,
    read_manifest,
    read_small_file,
)
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer


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
        _verify_tokenizer(data_set.tokenizer(manifest), manifest, where=f"{data_set.location}/{TOKENIZER_FOLDER}")
        targets: Counter[tuple[str, str]] = Counter()
        documents: Counter[tuple[str, str]] = Counter()
        for stream in manifest.streams:
            _verify_stream(data_set, stream, manifest)
            targets[stream.source, stream.split] += stream.targets
            documents[stream.source, stream.split] += stream.documents
    for source, counts in manifest.counts.items():
        if imbalance := counts.imbalance():
            raise DataError(f"{out}: the counts of source {source} do not balance: {imbalance}; build again")
        for split in SPLITS:
            if (documents[source, split], targets[source, split]) != (counts.documents[split], counts.targets[split]):
                raise DataError(
                    f"{out}: the streams of {split}/{source} do not hold the documents and targets of the manifest's "
                    "counts; build again"
                )
    return manifest


def verify_hashes(out: str | Path, *, observer: Observer) -> Manifest:
    """Check the hashes of all files of a local data set, without reading packs, and return its manifest.

    Raises:
        DataError: a file is missing or changed, or the tokenizer is not the manifest's.
    """
    out = Path(out)
    manifest = read_manifest(out)
    _verify_tokenizer(load_tokenizer(out / TOKENIZER_FOLDER), manifest, where=str(out / TOKENIZER_FOLDER))
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


def _verify_tokenizer(tokenizer: Tokenizer, manifest: Manifest, *, where: str) -> None:
    if tokenizer.record() != manifest.tokenizer:
        raise DataError(
            f"{where}: {tokenizer.sha256} differs from the manifest's {manifest.tokenizer.sha256}; restore it, or "
            "build again"
        )


def _verify_stream(data_set: DataSet, stream: StreamRecord, manifest: Manifest) -> None:
    folder = f"{data_set.location}/{stream.path}"
    for index in data_set.files([(f"{stream.path}/{INDEX_NAME}", stream.index_sha256)]):
        check_index(
            read_small_file(index), stream, vocab_size=manifest.tokenizer.vocab_size, where=f"{folder}/{INDEX_NAME}"
        )
    found: Counter[str] = Counter()
    names = [(f"{stream.path}/{shard.basename}", shard.sha256) for shard in stream.shards]
    for shard, file in zip(stream.shards, data_set.files(names), strict=True):
        for number, pack in enumerate(read_shard(file, shard, where=f"{folder}/{shard.basename}")):
            where = f"{folder}/{shard.basename}: pack {number}"
            check_pack(pack, pack_tokens=manifest.pack_tokens, vocab_size=manifest.tokenizer.vocab_size, where=where)
            inputs = pack["lengths"].astype("int64") - 1
            if inputs.min() < stream.lower or inputs.max() > stream.upper:
                raise DataError(
                    f"{where}: lengths {inputs.min()} … {inputs.max()} in bucket {stream.bucket}; build again"
                )
            if int(pack["tokens"].max()) >= manifest.tokenizer.vocab_size:
                raise DataError(f"{where}: an id beyond the vocabulary; build again")
            begins = pack["starts"] == 0
            if (pack["tokens"][offsets_of(pack["lengths"])[:-1]][begins] != manifest.tokenizer.bos_id).any():
                raise DataError(f"{where}: a document does not begin with bos; build again")
            found.update(
                packs=1,
                pieces=len(inputs),
                documents=int(begins.sum()),
                targets=int(inputs.sum()),
                bytes=int(pack["bytes"].sum(dtype="int64")),
            )
    for field in ("packs", "pieces", "documents", "targets", "bytes"):
        if found[field] != getattr(stream, field):
            raise DataError(
                f"{folder}: holds {found[field]} {field}, the manifest says {getattr(stream, field)}; build again"
            )
