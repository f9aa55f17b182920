"""The on-disk contract: names, manifest, counts, packs."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from streaming_rwkv.shards import (
    FORMAT,
    DataError,
    Manifest,
    ShardRecord,
    SourceCounts,
    StreamRecord,
    TokenizerRecord,
    bucket_bounds,
    check_pack,
    columns,
    offsets_of,
    parse_manifest,
    read_manifest,
    sha256_of_file,
    stream_path,
    token_dtype,
)


def manifest(**changes: object) -> Manifest:
    stream = StreamRecord(
        split="train",
        source="c4",
        lower=1,
        upper=256,
        documents=3,
        pieces=3,
        targets=12,
        bytes=30,
        packs=2,
        index_sha256="1" * 64,
        shards=[
            ShardRecord(basename="shard.00000.mds.zstd", bytes=9, sha256="2" * 64, raw_bytes=20, raw_sha256="", packs=2)
        ],
    )
    values = {
        "format": FORMAT,
        "pack_tokens": 8,
        "edges": [256],
        "tokenizer": TokenizerRecord(
            kind="rwkv-world", name="rwkv-world", sha256="3" * 64, vocab_size=65536, bos_id=0, eos_id=0
        ),
        "config": {"seed": 17},
        "counts": {
            "c4": counts(
                documents={"train": 3, "validation": 0},
                documents_read=6,
                targets_read=32,
                targets={"train": 12, "validation": 0},
            )
        },
        "streams": [stream],
    }
    return Manifest(**(values | changes))


def counts(**changes: object) -> SourceCounts:
    values = {
        "documents_read": 10,
        "documents": {"train": 6, "validation": 1},
        "duplicates": 2,
        "rejected": {"invalid JSON": 1},
        "targets_read": 100,
        "targets": {"train": 70, "validation": 10},
        "targets_duplicate": 15,
        "targets_cut": 5,
    }
    return SourceCounts(**(values | changes))


def test_buckets_are_adjacent():
    assert bucket_bounds([256, 512, 2048]) == [(1, 256), (257, 512), (513, 2048)]


def test_ids_are_stored_in_the_narrowest_type_that_holds_them():
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32
    assert columns(65536)["tokens"] == "ndarray:uint16"
    assert columns(128256)["tokens"] == "ndarray:uint32"


def test_a_stream_has_a_folder_by_split_source_and_bucket():
    assert stream_path("train", "c4", "1-256") == "train/c4/1-256"
    assert manifest().streams[0].path == "train/c4/1-256"


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    (tmp_path / "manifest.json").write_bytes(manifest().to_json())
    again = read_manifest(tmp_path)
    assert again == manifest()
    assert again.fingerprint == manifest().fingerprint
    assert again.streams[0].targets_per_pack == 6.0
    assert again.select("validation") == []


def with_shard(**changes: object) -> Manifest:
    """Return the manifest with changed fields of its first shard."""
    made = manifest()
    stream = made.streams[0]
    shard = stream.shards[0].model_copy(update=changes)
    return made.model_copy(update={"streams": [stream.model_copy(update={"shards": [shard]})]})


def test_the_fingerprint_does_not_depend_on_how_shards_are_compressed():
    stream = manifest().streams[0].model_copy(update={"index_sha256": "9" * 64})
    assert with_shard(sha256="9" * 64, bytes=8).fingerprint == manifest().fingerprint
    assert manifest(streams=[stream]).fingerprint == manifest().fingerprint


def test_the_fingerprint_depends_on_what_shards_hold_and_on_all_other_fields():
    others = [
        with_shard(raw_sha256="9" * 64),
        with_shard(raw_bytes=21),
        manifest(config={"seed": 18}),
        manifest(counts={"c4": counts(duplicates=1)}),
        manifest(pack_tokens=9),
    ]
    assert len({made.fingerprint for made in (manifest(), *others)}) == 6


def test_no_manifest_means_no_finished_data_set(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: no manifest.*streaming-rwkv prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "found format None, but this version reads"),
        (
            b'{"format": "streaming-rwkv/1"}',
            "found format 'streaming-rwkv/1', but this version reads 'streaming-rwkv/2'; rebuild the data set with "
            "`streaming-rwkv prepare RECIPE`",
        ),
        (json.dumps({"format": FORMAT}).encode(), "pack_tokens: required"),
        (manifest().to_json().replace(b"{", b'{"edgse": 1,', 1), "edgse: unknown key; did you mean 'edges'"),
    ],
)
def test_an_invalid_manifest_is_refused_with_the_reason(content, message):
    with pytest.raises(DataError, match=f"^here: {message}"):
        parse_manifest(content, where="here")


@pytest.mark.parametrize("name", ["../shard", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a\0b"])
def test_a_shard_outside_its_folder_is_refused(name):
    content = json.loads(manifest().to_json())
    content["streams"][0]["shards"][0]["basename"] = name
    with pytest.raises(DataError, match="expected a plain file name"):
        parse_manifest(json.dumps(content).encode(), where="here")


@pytest.mark.parametrize("name", ["../../evil", "/etc", "a/b", "a\\b", "", ".", ".."])
def test_a_source_outside_the_data_set_is_refused(name):
    content = json.loads(manifest().to_json())
    content["streams"][0]["source"] = name
    with pytest.raises(DataError, match=r"source: found .* expected a folder name"):
        parse_manifest(json.dumps(content).encode(), where="here")


def test_counts_balance():
    assert counts().imbalance() is None
    assert counts(duplicates=1).imbalance() == "10 documents read, 9 accounted for"
    assert counts(targets_cut=4).imbalance() == "100 targets read, 99 accounted for"


@pytest.mark.parametrize("lengths", [np.array([2, 0, 5, 3], np.uint32), [2, 0, 5, 3]])
def test_offsets_of_lengths(lengths):
    assert offsets_of(lengths).tolist() == [0, 2, 2, 7, 10]
    assert offsets_of(lengths).dtype == np.int64
    assert offsets_of(lengths[:0]).tolist() == [0]


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (3 << 20))
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"x" * (3 << 20)).hexdigest()


def pack(lengths: list[int], tokens: int, **changes: object) -> dict[str, object]:
    whole = {
        "lengths": np.array(lengths, np.uint32),
        "starts": np.zeros(len(lengths), np.uint32),
        "bytes": np.zeros(len(lengths), np.uint32),
        "keys": np.zeros(len(lengths), np.uint64),
        "tokens": np.zeros(tokens, np.uint16),
    }
    return whole | changes


SMALL = manifest(
    pack_tokens=6,
    edges=[4],
    tokenizer=TokenizerRecord(kind="huggingface", name="w", sha256="", vocab_size=97, bos_id=0, eos_id=0),
)
STREAM = SMALL.streams[0].model_copy(update={"lower": 1, "upper": 4})


def test_a_valid_pack_passes():
    check_pack(pack([2, 4], 6), stream=STREAM, manifest=SMALL, where="here")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (pack([2, 4], 6, keys=np.zeros(1, np.uint64)), "columns disagree on the number of pieces"),
        (pack([2, 4], 7), r"lengths \[2, 4\] do not describe 7 stored tokens"),
        (pack([1, 4], 5), r"lengths \[1, 4\] do not describe"),
        (pack([4, 4, 2], 10), "7 inputs in a pack, the manifest allows 6"),
        (pack([2, 6], 8), r"lengths 1 … 5 in bucket 1-4"),
        (pack([2, 4], 6) | {"tokens": np.zeros(6, np.uint32)}, "tokens is 1-dimensional uint32, not ndarray:uint16"),
        (pack([2, 4], 6) | {"tokens": np.zeros((6, 1), np.uint16)}, "tokens is 2-dimensional uint16"),
        (pack([2, 4], 6, starts=np.zeros(2, np.float32)), "starts is 1-dimensional float32"),
        (pack([2, 4], 6) | {"tokens": np.ones(6, np.uint16)}, "a document does not begin with bos"),
        (pack([], 0), r"lengths \[\] do not describe 0 stored tokens"),
    ],
)
def test_a_pack_that_breaks_the_contract_is_refused(broken, message):
    with pytest.raises(DataError, match=f"^here: {message}"):
        check_pack(broken, stream=STREAM, manifest=SMALL, where="here")


def test_an_id_beyond_the_vocabulary_is_refused():
    broken = pack([2, 4], 6) | {"tokens": np.array([0, 1, 97, 3, 4, 5], np.uint16)}
    with pytest.raises(DataError, match=r"^here: found token id 97, but the tokenizer has 97 ids"):
        check_pack(broken, stream=STREAM, manifest=SMALL, where="here")


def test_a_manifest_that_is_not_a_regular_file_is_refused_at_once(tmp_path):
    path = tmp_path / "manifest.json"
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"manifest\.json: found a named pipe, expected a regular file of at most"):
        read_manifest(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"manifest\.json: found a device or socket, expected a regular file"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(
        DataError, match=r"manifest\.json: found 1,073,741,825 bytes, expected .* at most 1,073,741,824"
    ):
        read_manifest(tmp_path)
