"""Shards equal those of MDSWriter byte for byte, and Streaming reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from prep.dataset.shard_reader import read_shard
from prep.dataset.shard_writer import ShardFormat, index_bytes, write_index, write_shards
from streaming_rwkv.shards import DataError, columns

# Streaming leaves its shard files to the garbage collector.
streaming_leaks = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
rng = np.random.default_rng(0)


def pack(pieces: int, tokens: int, vocab_size: int) -> dict[str, np.ndarray]:
    return {
        "tokens": rng.integers(0, vocab_size, tokens).astype(np.uint16 if vocab_size <= 65536 else np.uint32),
        "lengths": rng.integers(2, 99, pieces).astype(np.uint32),
        "starts": rng.integers(0, 99, pieces).astype(np.uint32),
        "bytes": rng.integers(0, 99, pieces).astype(np.uint32),
        "keys": rng.integers(0, 1 << 63, pieces).astype(np.uint64),
    }


def packs(vocab_size: int) -> list[dict[str, np.ndarray]]:
    """Array lengths on both sides of each type that stores them."""
    sizes = [(1, 2), (1, 255), (2, 256), (300, 8192), (1, 65535), (1, 65536), *[(7, 8000)] * 20]
    return [pack(pieces, tokens, vocab_size) for pieces, tokens in sizes]


@pytest.mark.parametrize("vocab_size", [65536, 128256])
@pytest.mark.parametrize("level", [1, 3])
def test_shards_and_index_equal_those_of_mds_writer(tmp_path, vocab_size, level):
    from streaming import MDSWriter

    form = ShardFormat(columns=columns(vocab_size), compression_level=level, shard_bytes=300_000)
    samples = packs(vocab_size)
    (tmp_path / "ours").mkdir()
    shards = write_shards(samples, tmp_path / "ours", form=form)
    write_index(shards, tmp_path / "ours", form=form)
    with MDSWriter(
        out=str(tmp_path / "theirs"),
        columns=columns(vocab_size),
        compression=f"zstd:{level}",
        hashes=["sha256"],
        size_limit=300_000,
    ) as writer:
        for sample in samples:
            writer.write(sample)
    ours, theirs = (sorted((tmp_path / name).iterdir()) for name in ("ours", "theirs"))
    assert [file.name for file in ours] == [file.name for file in theirs]
    assert len(ours) > 2
    for our, their in zip(ours[1:], theirs[1:], strict=True):  # index.json sorts first
        decompress = zstandard.ZstdDecompressor().decompress
        assert decompress(our.read_bytes()) == decompress(their.read_bytes())
    if _same_zstd():
        assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]


def _same_zstd() -> bool:
    """Compressed bytes, and with them the index's hashes, are equal for equal versions of libzstd.

    (And for shards below a megabyte: above it, Streaming's libzstd uses as many threads as there are cores, and its
    output depends on their number. Ours does not.)
    """
    import zstd

    return zstd.ZSTD_version() == ".".join(map(str, zstandard.ZSTD_VERSION))


@pytest.mark.slow  # not beside other tests: Streaming takes names of shared memory without a lock
@streaming_leaks
def test_streaming_reads_what_was_written(tmp_path):
    from streaming import StreamingDataset

    form = ShardFormat(columns=columns(65536), compression_level=1, shard_bytes=300_000)
    samples = packs(65536)
    write_index(write_shards(samples, tmp_path, form=form), tmp_path, form=form)
    dataset = StreamingDataset(local=str(tmp_path), shuffle=False, batch_size=1, validate_hash="sha256")
    assert len(dataset) == len(samples)
    for read, wrote in zip(dataset, samples, strict=True):
        assert sorted(read) == sorted(wrote)
        for name, column in wrote.items():
            assert read[name].dtype == column.dtype
            np.testing.assert_array_equal(read[name], column)


def test_read_shard_returns_the_written_packs(tmp_path):
    form = ShardFormat(columns=columns(128256), compression_level=1, shard_bytes=300_000)
    samples = packs(128256)
    shards = write_shards(samples, tmp_path, form=form)
    read = [sample for shard in shards for sample in read_shard(tmp_path / shard.basename, shard)]
    for ours, wrote in zip(read, samples, strict=True):
        for name, column in wrote.items():
            np.testing.assert_array_equal(ours[name], column)


def test_no_packs_give_no_shards(tmp_path):
    form = ShardFormat(columns=columns(65536), compression_level=1, shard_bytes=300_000)
    assert write_shards([], tmp_path, form=form) == []
    assert json.loads(index_bytes([], form=form)) == {"version": 2, "shards": []}
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shard(tmp_path: Path):
    form = ShardFormat(columns=columns(65536), compression_level=1, shard_bytes=300_000)
    (written,) = write_shards(packs(65536)[:3], tmp_path, form=form)
    return tmp_path / written.basename, written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-9], "not a shard of this data set"),
        (lambda content: b"no zstd" + content, "not a shard of this data set"),
        (lambda content: zstandard.ZstdCompressor().compress(b""), "not a shard of this data set|bytes and"),
        (lambda content: zstandard.ZstdCompressor().compress(bytes(400_000)), "not a shard of this data set"),
    ],
)
def test_a_file_that_is_not_the_shard_is_refused(shard, change, message):
    file, record = shard
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        list(read_shard(file, record))


def test_a_shard_with_other_counts_is_refused(shard):
    file, record = shard
    with pytest.raises(DataError, match=r"3 packs, the manifest says \d+ and 4"):
        list(read_shard(file, record.model_copy(update={"packs": 4})))


def test_a_missing_shard_is_named(shard):
    file, record = shard
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name}: missing"):
        list(read_shard(file, record))
