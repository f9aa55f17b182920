"""The on-disk contract between `prep`, which writes data sets, and training, which reads them.

    {out}/manifest.json                      written last; the data set's fingerprint is computed from it
    {out}/tokenizer/                         the tokenizer's own files: a data set is complete in itself
    {out}/{split}/{source}/{bucket}/         one stream: index.json and shard.NNNNN.mds.zstd, as Streaming reads them

One MDS sample is one *pack*: pieces of documents of one bucket of one source, at most `pack_tokens` inputs.

    column    type               meaning, P = pieces in the pack
    tokens    (S,) uint16|uint32 the stored tokens of all pieces, one after another, unpadded
    lengths   (P,) uint32        stored tokens of each piece; they add up to S
    starts    (P,) uint32        position of the piece's first input in its document; 0 where a document begins
    bytes     (P,) uint32        UTF-8 bytes of text behind the targets of each piece
    keys      (P,) uint64        stable key of the document (source, file, row)

A document of text tokens t1 … tn is stored as [bos, t1 … tn, eos]. A piece with m stored tokens gives m - 1 inputs
(all but its last) and m - 1 targets (all but its first). Consecutive pieces of a long document share one token,
so every text token and one end per document is a target exactly once. docs/contract.md has a worked example.

This module imports neither torch nor streaming: the workers of `prep` import it, and so does training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from streaming_rwkv.config import Config, ConfigError, UserError, validate
from streaming_rwkv.filesystem import is_plain_name, read_regular_file
from streaming_rwkv.location import checked_local, is_remote
from streaming_rwkv.version import PROGRAM

FORMAT = "streaming-rwkv/2"
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
LARGEST_FILE_BYTES = 1 << 30  # of a manifest, an index, statistics, or a tokenizer's file
LARGEST_SHARD_BYTES = 1 << 32  # MDS keeps offsets as uint32: nothing larger can be a shard
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class DataError(UserError):
    """A data set that is missing, incomplete, corrupt, or not the one that was asked for."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest stored type that holds every token id below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def columns(vocab_size: int) -> dict[str, str]:
    """Return the MDS encoding of each column, sorted by name as MDSWriter sorts them."""
    return {
        "bytes": "ndarray:uint32",
        "keys": "ndarray:uint64",
        "lengths": "ndarray:uint32",
        "starts": "ndarray:uint32",
        "tokens": f"ndarray:{np.dtype(token_dtype(vocab_size)).name}",
    }


def bucket_name(lower: int, upper: int) -> str:
    """Return the folder name of the bucket with lengths `lower` … `upper`, both included."""
    return f"{lower}-{upper}"


def bucket_bounds(edges: Sequence[int]) -> list[tuple[int, int]]:
    """Return [(1, 256), (257, 512), …] for the upper edges [256, 512, …]."""
    return [(previous + 1, edge) for previous, edge in zip([0, *edges[:-1]], edges, strict=True)]


def stream_path(split: str, source: str, bucket: str) -> str:
    """Return a stream's folder below the data set, with forward slashes as in object keys."""
    return f"{split}/{source}/{bucket}"


_LONGEST_NAME = 128  # longer ones, with what is put before and after them, are too long for file systems


def check_source_name(name: str) -> str:
    """Return the name of a source if it can be the name of a folder.

    Raises:
        ValueError: it cannot be; `../` or an absolute path would lead out of a data set, or out of a reader's cache.
    """
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_LONGEST_NAME - 1}}}", name):
        raise ValueError(
            f"found {name[: 2 * _LONGEST_NAME]!r}, expected a folder name: letters, digits, '_', '-' and '.', at most "
            f"{_LONGEST_NAME}"
        )
    return name


class ShardRecord(Config):
    """One shard file: its compressed bytes as stored, and the raw bytes that they expand to."""

    basename: str
    bytes: PositiveInt
    sha256: str
    raw_bytes: PositiveInt
    raw_sha256: str
    packs: PositiveInt

    @field_validator("bytes", "raw_bytes")
    @classmethod
    def _within_mds(cls, size: int) -> int:
        if size >= LARGEST_SHARD_BYTES:
            raise ValueError(f"found {size}, but a shard has less than {LARGEST_SHARD_BYTES} bytes")
        return size

    @field_validator("basename")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not is_plain_name(name):
            raise ValueError(f"found {name!r}, expected a plain file name without folders")
        return name


class StreamRecord(Config):
    """One folder of shards: a bucket of a source in a split."""

    split: Split
    source: str
    lower: PositiveInt
    upper: PositiveInt
    documents: NonNegativeInt  # that begin here: a long document is counted with its first piece
    pieces: PositiveInt
    targets: PositiveInt  # = inputs: the tokens that a model is trained on
    bytes: NonNegativeInt
    packs: PositiveInt
    index_sha256: str
    shards: list[ShardRecord]

    _named = field_validator("source")(check_source_name)

    @model_validator(mode="after")
    def _adds_up(self) -> StreamRecord:
        if self.lower > self.upper:
            raise ValueError(f"{self.path}: lower is {self.lower}, above upper {self.upper}")
        # The order of packs is planned with the stream's count, and packs are read with the counts of its shards.
        if (packs := sum(shard.packs for shard in self.shards)) != self.packs:
            raise ValueError(f"{self.path}: found {self.packs} packs, but its shards have {packs} in all")
        return self

    @property
    def bucket(self) -> str:
        return bucket_name(self.lower, self.upper)

    @property
    def path(self) -> str:
        return stream_path(self.split, self.source, self.bucket)

    @property
    def targets_per_pack(self) -> float:
        return self.targets / self.packs


class TokenizerRecord(Config):
    """The tokenizer that made the tokens; `sha256` covers everything that decides the ids."""

    kind: Literal["huggingface", "rwkv-world"]
    name: str
    sha256: str
    vocab_size: int = Field(ge=1, le=1 << 32)
    bos_id: NonNegativeInt
    eos_id: NonNegativeInt

    @model_validator(mode="after")
    def _within_vocabulary(self) -> TokenizerRecord:
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name}: found {getattr(self, name)}, but vocab_size is {self.vocab_size}")
        return self


class SourceCounts(Config):
    """Counts of a source's documents and targets, read and written; targets are text tokens and ends of documents."""

    documents_read: NonNegativeInt
    documents: dict[Split, NonNegativeInt]
    duplicates: NonNegativeInt
    rejected: dict[str, NonNegativeInt]  # by reason
    targets_read: NonNegativeInt  # of the documents that were tokenized and not rejected
    targets: dict[Split, NonNegativeInt]
    targets_duplicate: NonNegativeInt = 0  # of the duplicates
    targets_cut: NonNegativeInt  # by `long_documents: truncate`; 0 otherwise

    def imbalance(self) -> str | None:
        """Return a description of the counts that do not add up, or None."""
        documents = sum(self.documents.values()) + self.duplicates + sum(self.rejected.values())
        if documents != self.documents_read:
            return f"{self.documents_read} documents read, {documents} accounted for"
        targets = sum(self.targets.values()) + self.targets_duplicate + self.targets_cut
        if targets != self.targets_read:
            return f"{self.targets_read} targets read, {targets} accounted for"
        return None


class Manifest(Config):
    """The contents of a data set. It is written last: a data set with a manifest is complete."""

    format: str
    pack_tokens: PositiveInt
    edges: list[PositiveInt] = Field(min_length=1)
    tokenizer: TokenizerRecord
    config: dict[str, Any]  # the prep configuration, as far as it decides the output
    counts: dict[str, SourceCounts]  # by source
    streams: list[StreamRecord]

    @field_validator("edges")
    @classmethod
    def _rising(cls, edges: list[int]) -> list[int]:
        if any(left >= right for left, right in itertools.pairwise(edges)):
            raise ValueError(f"found {edges[:10]}, expected rising lengths such as [256, 512, 1024]")
        return edges

    @model_validator(mode="after")
    def _each_stream_once(self) -> Manifest:
        paths: set[str] = set()
        for stream in self.streams:
            if stream.path in paths:
                raise ValueError(f"streams: found {stream.path} twice; each stream has one entry")
            paths.add(stream.path)
            if stream.targets > stream.packs * self.pack_tokens:
                raise ValueError(
                    f"streams: {stream.path} has {stream.targets} targets, but {stream.packs} packs of at most "
                    f"{self.pack_tokens} inputs"
                )
        return self

    def contradiction(self) -> str | None:
        """Return a description of the first counts that do not fit together, or None."""
        buckets = set(bucket_bounds(self.edges))
        documents: Counter[tuple[str, Split]] = Counter()
        targets: Counter[tuple[str, Split]] = Counter()
        for stream in self.streams:
            if stream.source not in self.counts:
                return f"streams: {stream.path} is of a source that `counts` does not have"
            if (stream.lower, stream.upper) not in buckets:
                return f"streams: {stream.path} is no bucket of the edges {self.edges[:10]}"
            documents[stream.source, stream.split] += stream.documents
            targets[stream.source, stream.split] += stream.targets
        for source, counts in self.counts.items():
            if imbalance := counts.imbalance():
                return f"the counts of source {source} do not balance: {imbalance}"
            for split in SPLITS:
                found = documents[source, split], targets[source, split]
                if found != (counts.documents.get(split), counts.targets.get(split)):
                    return (
                        f"the streams of {split}/{source} hold {found[0]} documents and {found[1]} targets, but its "
                        f"counts are {counts.documents.get(split)} and {counts.targets.get(split)}"
                    )
        return None

    def to_json(self) -> bytes:
        """Return the canonical bytes: equal manifests are equal files."""
        return _canonical_json(self.model_dump())

    @property
    def fingerprint(self) -> str:
        """Identify this data set in checkpoints and errors, whatever version of zstandard compressed its shards.

        The sha256 of the manifest's canonical bytes, without the sizes and hashes that depend on compression: those
        of compressed shards, and of the indexes that list them. The shards' raw bytes count, through `raw_sha256`.
        """
        values = self.model_dump(
            exclude={"streams": {"__all__": {"index_sha256": True, "shards": {"__all__": {"bytes", "sha256"}}}}}
        )
        return hashlib.sha256(_canonical_json(values)).hexdigest()

    def select(self, split: Split) -> list[StreamRecord]:
        return [stream for stream in self.streams if stream.split == split]


def _canonical_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_manifest(content: bytes, *, where: str) -> Manifest:
    """Parse and check the content of a manifest.json.

    Raises:
        DataError: not JSON, another format, fields that are missing, unknown or of the wrong kind, or counts that do
            not add up.
    """
    try:
        values = json.loads(content)
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair is no text
        raise DataError(f"{where}: not valid JSON ({error}); rebuild the data set with `{PROGRAM} prepare`") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{where}: found format {found!r}, but this version reads {FORMAT!r}; rebuild the data set with "
            f"`{PROGRAM} prepare RECIPE`, after removing this one or with another `out=`"
        )
    try:
        manifest = validate(Manifest, values, where=where)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if contradiction := manifest.contradiction():
        raise DataError(f"{where}: {contradiction}; build again")
    return manifest


def check_is_finished(location: str, *, setting: str) -> None:
    """Refuse a local folder that has no manifest; a data set in object storage is found out when it is read.

    Args:
        setting: the name of the location, for the error.
    Raises:
        DataError: there is none: nothing was built, the build did not finish, or the path is wrong.
    """
    if is_remote(location):
        return
    try:
        os.stat(Path(location) / MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(location, MANIFEST_NAME, setting=setting) from None
    except OSError:  # reading it says more
        return


def missing_file(location: str, name: str, *, setting: str) -> DataError:
    """Return the error of a data set that lacks the file `name`; `setting` is the name of its location."""
    remedy = f"build the data set with `{PROGRAM} prepare`" if name == MANIFEST_NAME else "rebuild it"
    return DataError(
        f"{location.rstrip('/')}/{name}: missing, so this is not a finished data set; {remedy}, or fix `{setting}`"
    )


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a local data set.

        {stream.path: stream.packs for stream in read_manifest("shards").streams}

    Raises:
        DataError: there is none (nothing was built, or the build did not finish), or it is not valid.
        LocationError: not a local path.
    """
    path = Path(checked_local(folder)) / MANIFEST_NAME
    try:
        content = read_small_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: no manifest, so no finished data set here; build it with `{PROGRAM} prepare`, "
            "or run the same command again if it was interrupted"
        ) from None
    return parse_manifest(content, where=str(path))


def read_small_file(path: Path, *, most: int = LARGEST_FILE_BYTES) -> bytes:
    """Return the content of a manifest, an index or statistics on this machine.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DataError: not a regular file, too large, or unreadable.
    """
    try:
        return read_regular_file(path, most=most)
    except UserError as error:
        raise DataError(str(error)) from None


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def offsets_of(lengths: NDArray[Any] | Sequence[int]) -> NDArray[np.int64]:
    """Return (N + 1,) the offset of each of N runs in their concatenation, such as pieces in `tokens`, and its end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets


def check_pack(pack: Mapping[str, Any], *, stream: StreamRecord, manifest: Manifest, where: str) -> None:
    """Check that a pack of `stream` follows the contract: otherwise its numbers would reach the model as noise.

    Raises:
        DataError: columns of another type or of different length, lengths that do not add up, a piece outside the
            bucket, too many inputs, an id beyond the vocabulary, or a document that does not begin with bos.
    """
    lengths, starts, tokens = pack["lengths"], pack["starts"], pack["tokens"]
    pieces = len(lengths)
    vocab_size = manifest.tokenizer.vocab_size
    for name, encoding in columns(vocab_size).items():
        if pack[name].ndim != 1 or f"ndarray:{pack[name].dtype.name}" != encoding:
            raise DataError(f"{where}: {name} is {pack[name].ndim}-dimensional {pack[name].dtype.name}, not {encoding}")
    if any(len(pack[name]) != pieces for name in ("starts", "bytes", "keys")):
        raise DataError(f"{where}: columns disagree on the number of pieces; the shard was not written by prep")
    if not pieces or int(lengths.sum()) != len(tokens) or int(lengths.min()) < 2:
        raise DataError(f"{where}: lengths {_shown(lengths)} do not describe {len(tokens)} stored tokens")
    if len(tokens) - pieces > manifest.pack_tokens:
        raise DataError(f"{where}: {len(tokens) - pieces} inputs in a pack, the manifest allows {manifest.pack_tokens}")
    shortest, longest = int(lengths.min()) - 1, int(lengths.max()) - 1
    if shortest < stream.lower or longest > stream.upper:
        raise DataError(f"{where}: lengths {shortest} … {longest} in bucket {stream.bucket}; build again")
    if (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"{where}: found token id {largest}, but the tokenizer has {vocab_size} ids; the data set was changed or "
            f"damaged: rebuild it with `{PROGRAM} prepare`"
        )
    if (tokens[offsets_of(lengths)[:-1][starts == 0]] != manifest.tokenizer.bos_id).any():
        raise DataError(f"{where}: a document does not begin with bos; build again")


def _shown(values: NDArray[Any]) -> str:
    return str(values.tolist()) if len(values) <= 10 else f"[{', '.join(map(str, values[:10].tolist()))}, …]"
