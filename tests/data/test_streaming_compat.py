"""The internals of Streaming that are overridden: each is still there, called as expected, and does what it is for."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import streaming
from streaming import Stream, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import SharedArray, SharedMemory, array, prefix

from streaming_rwkv.config import UserError
from streaming_rwkv.data import streaming_compat
from streaming_rwkv.data.shard_set import ShardSet, open_shard_set
from streaming_rwkv.data.streaming_compat import SUPPORTED_VERSION, VerifiedDataset, VerifiedStream, check_version
from streaming_rwkv.shards import DataError

STREAMS = {("web", 1, 16): 12}


@pytest.fixture
def opened(tmp_path, write_data_set):
    """A dataset over a small data set, and the folder of its shards; closed after the test."""
    data = write_data_set(tmp_path / "data", STREAMS, validation={})
    shard_set = open_shard_set(data, cache=tmp_path / "cache", splits=("train",), timeout_seconds=20, fetch=True)
    dataset = open_dataset(shard_set)
    yield dataset, shard_set
    dataset.close()
    shard_set.lock.release()


def open_dataset(shard_set: ShardSet, cache_limit: int | None = None) -> VerifiedDataset:
    streams = shard_set.streams(shard_set.manifest.select("train"), download_attempts=1, timeout_seconds=20)
    return VerifiedDataset(streams, lock=shard_set.cache / ".lock", cache_limit=cache_limit, fetch_ahead=8, batch=4)


def cached(shard_set: ShardSet) -> list[Path]:
    return sorted(shard_set.cache.rglob("*.mds"))


def test_another_version_is_refused_with_the_command_that_installs_the_supported_one():
    assert streaming.__version__ == SUPPORTED_VERSION
    with pytest.raises(UserError, match=r"^mosaicml-streaming: found version 0\.12\.0, .* of 0\.13\.0; pip install"):
        check_version("0.12.0")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (VerifiedStream._prepare_shard_part, Stream._prepare_shard_part),
        (VerifiedDataset.prepare_shard, StreamingDataset.prepare_shard),
        (VerifiedDataset.get_item, StreamingDataset.get_item),
        (VerifiedDataset.state_dict, StreamingDataset.state_dict),
        (VerifiedDataset.load_state_dict, StreamingDataset.load_state_dict),
    ],
)
def test_overrides_take_the_arguments_that_streaming_passes(ours, theirs):
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_prepare_shard_part_replaces_a_shard_that_is_damaged_in_the_cache(opened):
    dataset, shard_set = opened
    whole = dataset[0]["tokens"].tolist()
    dataset.close()
    path = cached(shard_set)[0]
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    again = open_dataset(shard_set)
    try:
        assert again[0]["tokens"].tolist() == whole
    finally:
        again.close()
    assert path.read_bytes() == content


def test_prepare_shard_leaves_a_shard_that_failed_to_other_processes(opened):
    dataset, shard_set = opened
    for shard in Path(shard_set.location).rglob("*.zstd"):
        shard.unlink()
    with pytest.raises(DataError):
        dataset.prepare_shard(0)
    assert dataset._shard_states[0] == streaming_compat._ShardState.REMOTE


def test_a_shard_that_fails_elsewhere_while_this_process_looks_is_left_to_others(opened, monkeypatch):
    """Between two looks at the state, the process that was fetching the shard may have failed."""
    dataset, shard_set = opened
    for shard in Path(shard_set.location).rglob("*.zstd"):
        shard.unlink()
    dataset._shard_states[0] = streaming_compat._ShardState.PREPARING

    class OtherFails(streaming_compat.FileLock):
        def release(self, force=False):
            dataset._shard_states[0] = streaming_compat._ShardState.REMOTE
            super().release(force)

    monkeypatch.setattr(streaming_compat, "FileLock", OtherFails)
    dataset.prepare_shard(0, blocking=False)
    assert dataset._shard_states[0] == streaming_compat._ShardState.REMOTE


def test_a_shard_that_vanished_from_the_cache_and_its_source_is_left_to_others(opened):
    dataset, shard_set = opened
    dataset.prepare_shard(0)
    for path in [*Path(shard_set.location).rglob("*.zstd"), *cached(shard_set)]:
        path.unlink()
    with pytest.raises(DataError):
        dataset.prepare_shard(0)
    assert dataset._shard_states[0] == streaming_compat._ShardState.REMOTE


def test_shards_that_are_fetched_at_the_same_time_keep_to_the_limit(tmp_path, write_data_set, monkeypatch):
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 240}, validation={})
    shard_set = open_shard_set(data, cache=tmp_path / "cache", splits=("train",), timeout_seconds=20, fetch=True)
    shards = shard_set.manifest.streams[0].shards
    limit = 4 * max(shard.raw_bytes + shard.bytes for shard in shards) + 2000  # and the index
    dataset = open_dataset(shard_set, limit)
    fetch = VerifiedStream._prepare_shard_part
    started = []

    def fetch_others_first(self, *arguments):
        """Begin every other shard before this one is there."""
        if len(started) < dataset.num_shards - 1:
            started.append(self)
            dataset.prepare_shard(len(started))
        return fetch(self, *arguments)

    monkeypatch.setattr(VerifiedStream, "_prepare_shard_part", fetch_others_first)
    try:
        dataset.prepare_shard(0)
        assert sum(shard.raw_bytes for shard in shards) > 2 * limit
        assert 0 < sum(path.stat().st_size for path in cached(shard_set)) <= limit
        assert len(cached(shard_set)) == sum(dataset.is_local(shard) for shard in range(dataset.num_shards))
    finally:
        dataset.close()
        shard_set.lock.release()


def test_get_item_verifies_a_shard_once(opened):
    dataset, _ = opened
    assert not dataset._verified[0]
    dataset[0]
    assert dataset._verified[0]
    assert dataset.is_local(0)


def test_there_is_no_state_to_save(opened):
    dataset, _ = opened
    with pytest.raises(NotImplementedError, match="function of the step"):
        dataset.state_dict(0, True)
    with pytest.raises(NotImplementedError, match="function of the step"):
        dataset.load_state_dict({})


def test_the_lock_file_is_in_the_cache(opened):
    dataset, shard_set = opened
    dataset[0]
    assert Path(dataset._cache_filelock_path) == shard_set.cache / ".lock"
    names = {path.name for path in Path(tempfile.gettempdir()).iterdir()}
    assert f"{prefix._get_path(dataset._shm_prefix_int, 'filelock')}" not in names


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_shared_memory_is_removed_when_the_dataset_is_closed(opened):
    dataset, _ = opened
    own = prefix._get_path(dataset._shm_prefix_int, "")
    assert [name for name in os.listdir("/dev/shm") if name.startswith(own)]
    dataset.close()
    assert [name for name in os.listdir("/dev/shm") if name.startswith(own)] == []


def test_new_shared_memory_has_its_pages(tmp_path):
    with streaming_compat._recorded_shared_memory() as memories:
        values = SharedArray(1 << 20, np.uint8, f"streaming-rwkv-test-{os.getpid()}")
    try:
        assert len(memories) == 1
        status = os.fstat(memories[0].shm._fd)
        assert status.st_blocks * 512 >= 1 << 20  # a file with a hole would have no blocks
        assert len(values.numpy()) == 1 << 20
    finally:
        streaming_compat._close_shared_memory(memories)


def test_streaming_finds_names_and_memory_where_they_are_replaced():
    """The replaced attributes exist in the modules that use them, and are put back."""
    assert streaming_dataset.get_shm_prefix is prefix.get_shm_prefix
    assert prefix.SharedMemory is array.SharedMemory is SharedMemory
    ours = streaming_compat._take_prefix(1, alone=True)
    assert [*inspect.signature(prefix.get_shm_prefix).parameters] == [*inspect.signature(ours).parameters]


def test_a_process_that_reads_on_its_own_is_a_world_of_one(opened, monkeypatch):
    """Whatever the launcher's environment says: Streaming would start a process group, and wait for the other rank."""
    _, shard_set = opened
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    other = replace(shard_set, cache=shard_set.cache.with_name("other"))
    streams = other.streams(other.manifest.select("train"), download_attempts=1, timeout_seconds=20)
    for stream in streams:
        shutil.copytree(shard_set.cache / stream.record.path, stream.local)
    options = {"lock": other.cache / ".lock", "cache_limit": None, "fetch_ahead": 8, "batch": 4}
    dataset = VerifiedDataset(streams, as_rank=(1, 3), **options)
    try:
        assert (dataset.rank, dataset.num_ranks, dataset.worker()) == (1, 3, (0, 1))
        assert len(dataset[0]["tokens"])
    finally:
        dataset.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_arrays_that_a_killed_run_left_are_made_anew(opened, tmp_path):
    """Also those of a run whose first array is gone: Streaming would take its number, and write to the others."""
    dataset, shard_set = opened
    left = replace(shard_set, cache=tmp_path / "left")
    streams = left.streams(left.manifest.select("train"), download_attempts=1, timeout_seconds=20)
    for stream in streams:
        shutil.copytree(shard_set.cache / stream.record.path, stream.local)
    number = streaming_compat._shared_memory_number(left.cache / ".lock")
    path = Path(f"/dev/shm/{prefix._get_path(number, streaming_compat.COUNTS)}")
    path.write_bytes(b"\1")
    with closing(
        VerifiedDataset(streams, as_rank=(0, 1), lock=left.cache / ".lock", cache_limit=None, fetch_ahead=8, batch=4)
    ) as found:
        assert found._shm_prefix_int == number != dataset._shm_prefix_int
        assert path.stat().st_size == found._counts.numpy().nbytes > 1
        assert not found._counts.numpy().any()
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_shared_memory_is_left_alone(make, tmp_path):
    path = Path(f"/dev/shm/streaming-rwkv-test-{os.getpid()}_locals")
    make(path)
    try:
        streaming_compat.remove_stale_shared_memory(tmp_path)
        assert path.exists()
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


def test_only_unfinished_files_of_the_cache_are_removed_from_its_folder(tmp_path, write_data_set):
    data = write_data_set(tmp_path / "data", STREAMS, validation={})
    (tmp_path / "cache" / "thesis").mkdir(parents=True)
    (tmp_path / "cache" / "thesis" / "chapter.tmp").write_text("kept")
    (tmp_path / "cache" / "folder.tmp").mkdir()
    (tmp_path / "cache" / ".manifest.json.tmp").write_text("half of it")
    shard_set = open_shard_set(data, cache=tmp_path / "cache", splits=("train",), timeout_seconds=20, fetch=True)
    shard_set.lock.release()
    assert (tmp_path / "cache" / "thesis" / "chapter.tmp").read_text() == "kept"
    assert not (tmp_path / "cache" / ".manifest.json.tmp").exists()
