"""Small data sets by the contract, written with MosaicML's own MDSWriter: independent of prep."""

from __future__ import annotations

import gc
import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from streaming_rwkv.mds import read_index
from streaming_rwkv.shards import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    StreamRecord,
    columns,
    stream_path,
)
from tests.fork_server import ForkServer
from tests.small_data import PACK_TOKENS, VOCAB_SIZE, pack_of, save_tokenizer
from tests.source_counts import counts_of
from tools.s3_server import S3Server, running

# Neither a new random input nor a busy machine must fail a change; --hypothesis-profile=default searches on.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

gc.disable()  # until all test modules are imported


def pytest_collection_finish() -> None:
    """Leave what was imported out of all later garbage collections, which would go through all of it each time."""
    gc.freeze()
    gc.enable()


WriteDataSet = Callable[..., Path]


def write_stream(
    folder: Path, split: str, source: str, lower: int, upper: int, packs: int, *, number: int, packs_per_shard: int
) -> StreamRecord:
    from streaming import MDSWriter

    path = folder / stream_path(split, source, f"{lower}-{upper}")
    samples = [pack_of(number, i, lower=lower, upper=upper) for i in range(packs)]
    size_limit = packs_per_shard * (4 + max(sum(v.nbytes + 16 for v in s.values()) for s in samples)) + 2000
    with MDSWriter(
        out=str(path), columns=columns(VOCAB_SIZE), compression="zstd:3", hashes=["sha256"], size_limit=size_limit
    ) as writer:
        for sample in samples:
            writer.write(sample)
    index = (path / INDEX_NAME).read_bytes()
    return StreamRecord(
        split=split,
        source=source,
        lower=lower,
        upper=upper,
        documents=sum(len(s["lengths"]) for s in samples),
        pieces=sum(len(s["lengths"]) for s in samples),
        targets=sum(len(s["tokens"]) - len(s["lengths"]) for s in samples),
        bytes=sum(int(s["bytes"].sum()) for s in samples),
        packs=packs,
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=read_index(index, vocab_size=VOCAB_SIZE, where=str(path)),
    )


def _write_data_set(
    folder: Path,
    train: Mapping[tuple[str, int, int], int],
    *,
    validation: Mapping[tuple[str, int, int], int] | None = None,
    packs_per_shard: int = 8,
) -> Path:
    """`train` and `validation` give packs by (source, lower, upper)."""
    streams = [
        write_stream(folder, split, *key, packs, number=100 * s + i, packs_per_shard=packs_per_shard)
        for s, (split, wanted) in enumerate((("train", train), ("validation", validation or {})))
        for i, (key, packs) in enumerate(wanted.items())
    ]
    manifest = Manifest(
        format=FORMAT,
        pack_tokens=PACK_TOKENS,
        edges=sorted({s.upper for s in streams} | {s.lower - 1 for s in streams} - {0}),
        tokenizer=save_tokenizer(folder / TOKENIZER_FOLDER),
        config={},
        counts=counts_of(streams),
        streams=streams,
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def write_data_set() -> WriteDataSet:
    return _write_data_set


@pytest.fixture(scope="session")
def programs() -> Iterator[ForkServer]:
    """Start programs without their imports; see `tests.fork_server`."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for all tests, with the bucket `tests`. A test that kills it starts it again."""
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("tests")
        yield server


@pytest.fixture
def s3_place(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in the bucket `tests`, as s3://tests/…; the environment has its server's address and keys."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}"
