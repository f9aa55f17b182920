"""`verify`: every byte of a data set against its manifest, and every pack against the contract."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prep.dataset.finished import Place, check_file, opened
from prep.dataset.shard_reader import read_shard
from prep.execution.observer import Observer
from streaming_rwkv.shards import (
    INDEX_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    StreamRecord,
    check_pack,
    piece_bounds,
    read_manifest,
)
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer


def verify(out: str | Path) -> Manifest:
    """Read everything; of a data set in object storage, some shards at a time.

    Raises:
        DataError: a file that is missing or changed, a pack that breaks the contract, counts or books that do not
            add up, or another tokenizer than the manifest's.
        StorageError: likewise of objects, or the server fails.
    """
    with opened(out) as place:
        manifest = place.manifest()
        _verify_tokenizer(place.tokenizer(manifest), manifest, where=f"{place.location}/{TOKENIZER_FOLDER}")
        targets: Counter[tuple[str, str]] = Counter()
        documents: Counter[tuple[str, str]] = Counter()
        for stream in manifest.streams:
            _verify_stream(place, stream, manifest)
            targets[stream.source, stream.split] += stream.targets
            documents[stream.source, stream.split] += stream.documents
    for source, books in manifest.books.items():
        if wrong := books.imbalance():
            raise DataError(f"{out}: the books of source {source} do not balance: {wrong}; build again")
        for split in SPLITS:
            if (documents[source, split], targets[source, split]) != (books.documents[split], books.targets[split]):
                raise DataError(f"{out}: the streams of {split}/{source} do not hold what the books say; build again")
    return manifest


def verify_hashes(out: str | Path, *, observer: Observer) -> Manifest:
    """The manifest of a local data set whose files all have the hashes that it gives; packs are not looked into.

    Raises:
        DataError: a file that is missing or changed, or another tokenizer than the manifest's.
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
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
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


def _verify_stream(place: Place, stream: StreamRecord, manifest: Manifest) -> None:
    folder = f"{place.location}/{stream.path}"
    for index in place.files([(f"{stream.path}/{INDEX_NAME}", stream.index_sha256)]):
        indexed = [shard["zip_data"]["basename"] for shard in json.loads(index.read_bytes())["shards"]]
        if indexed != [shard.basename for shard in stream.shards]:
            raise DataError(f"{folder}/{INDEX_NAME}: names other shards than the manifest; restore it, or build again")
    found: Counter[str] = Counter()
    names = [(f"{stream.path}/{shard.basename}", shard.sha256) for shard in stream.shards]
    for shard, file in zip(stream.shards, place.files(names), strict=True):
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
            if (pack["tokens"][piece_bounds(pack["lengths"])[:-1]][begins] != manifest.tokenizer.bos_id).any():
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
