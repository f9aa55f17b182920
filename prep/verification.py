"""`verify`: every byte of a data set against its manifest, and every pack against the contract."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from prep.shard_reader import read_shard
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
    sha256_of_file,
)
from streaming_rwkv.tokenizer import load_tokenizer


def verify(out: str | Path) -> Manifest:
    """Read everything.

    Raises:
        DataError: a file that is missing or changed, a pack that breaks the contract, counts or books that do not
            add up, or another tokenizer than the manifest's.
    """
    out = Path(out)
    manifest = read_manifest(out)
    tokenizer = load_tokenizer(out / TOKENIZER_FOLDER)
    if tokenizer.record() != manifest.tokenizer:
        raise DataError(
            f"{out / TOKENIZER_FOLDER}: {tokenizer.sha256} differs from the manifest's {manifest.tokenizer.sha256}; "
            "restore it, or build again"
        )
    targets: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    for stream in manifest.streams:
        _verify_stream(out, stream, manifest)
        targets[stream.source, stream.split] += stream.targets
        documents[stream.source, stream.split] += stream.documents
    for source, books in manifest.books.items():
        if wrong := books.imbalance():
            raise DataError(f"{out}: the books of source {source} do not balance: {wrong}; build again")
        for split in SPLITS:
            if (documents[source, split], targets[source, split]) != (books.documents[split], books.targets[split]):
                raise DataError(f"{out}: the streams of {split}/{source} do not hold what the books say; build again")
    return manifest


def _verify_stream(out: Path, stream: StreamRecord, manifest: Manifest) -> None:
    folder = out / stream.path
    _verify_file(folder / INDEX_NAME, stream.index_sha256)
    indexed = [shard["zip_data"]["basename"] for shard in json.loads((folder / INDEX_NAME).read_bytes())["shards"]]
    if indexed != [shard.basename for shard in stream.shards]:
        raise DataError(f"{folder / INDEX_NAME}: names other shards than the manifest; restore it, or build again")
    found: Counter[str] = Counter()
    for shard in stream.shards:
        file = folder / shard.basename
        _verify_file(file, shard.sha256)
        for number, pack in enumerate(read_shard(file, shard)):
            where = f"{file}: pack {number}"
            check_pack(pack, pack_tokens=manifest.pack_tokens, where=where)
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


def _verify_file(file: Path, sha256: str) -> None:
    try:
        found = sha256_of_file(file)
    except FileNotFoundError:
        raise DataError(f"{file}: missing; the manifest names it: restore it, or build again") from None
    if found != sha256:
        raise DataError(f"{file}: sha256 {found}, the manifest says {sha256}; restore it, or build again")
