"""Fetching: the same packs for any world and any number of workers, and no shard that is wrong goes by."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.data import shard_set as shard_set_module
from streaming_rwkv.data import streaming_compat
from streaming_rwkv.data.loader import (
    LoaderOptions,
    PackDataset,
    check_batch_fits,
    data_spec,
    evaluation_batches,
    share_of_batches,
)
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.setting_names import RUN_SETTINGS
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.mds import check_index
from streaming_rwkv.processes import STOP_SIGNALS
from streaming_rwkv.shards import MANIFEST_NAME, DataError, read_manifest
from tests.data.streams import stream
from tests.fork_server import ROOT

TRAIN = {("web", 1, 16): 40, ("web", 17, 32): 30, ("code", 1, 16): 23}
WORKERS = [0, 1, 2]


@pytest.fixture(scope="module")
def built(tmp_path_factory, write_data_set):
    return write_data_set(tmp_path_factory.mktemp("built"), TRAIN, validation={("web", 1, 16): 5, ("code", 1, 16): 4})


@pytest.fixture
def data(built, tmp_path):
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "data"))


@pytest.fixture(autouse=True)
def opened():
    """Data sets that `open_dataset` opened, closed after each test."""
    yield OPENED
    while OPENED:
        OPENED.pop().close()


OPENED: list[PackDataset] = []


def open_dataset(data, cache, *, stages=({"passes": 2},), batch_packs=4, split="train", **options):
    shard_set = open_shard_set(data, cache=cache, splits=("train", "validation"), timeout_seconds=20, fetch=True)
    records = shard_set.manifest.select(split)
    configs = [StageConfig(**stage) for stage in stages]
    plan = make_plan(configs, records, batch_packs=batch_packs, seed=3, block_shards=2)
    if split == "train":
        batches, num_batches = plan.packs, plan.steps
    else:
        batches, num_batches = evaluation_batches([r.packs for r in records], batch_packs=batch_packs)
    dataset = PackDataset(
        shard_set,
        records,
        batches=batches,
        num_batches=num_batches,
        batch_packs=batch_packs,
        options=LoaderOptions(
            fetch_ahead=8, cache_limit=options.get("cache_limit"), download_attempts=2, timeout_seconds=20
        ),
    )
    OPENED.append(dataset)
    return dataset, plan, shard_set


def read(dataset, workers):
    return list(data_spec(dataset, workers=workers, timeout_seconds=20).dataloader)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 29])
def test_ranks_and_workers_read_the_packs_of_the_plan(ranks, workers, start, monkeypatch):
    monkeypatch.setattr("streaming_rwkv.data.loader.CHUNK_SLOTS", 5 * 8)  # several chunks, of which some are cut short
    table = np.arange(30 * 8).reshape(30, 8)
    rows = [np.empty((30 - start, 0), int)]
    for rank in range(ranks):
        shares = [
            share_of_batches(
                lambda a, b: table[a:b], start=start, stop=30, batch_packs=8,
                rank=rank, ranks=ranks, worker=worker, workers=workers,
            )
            for worker in range(workers)
        ]  # fmt: skip
        turns = itertools.islice(itertools.cycle(shares), 30 - start)  # as DataLoader asks its workers in turn
        rows.append(np.array([list(itertools.islice(share, 8 // ranks)) for share in turns]))
    assert np.concatenate(rows, axis=1).tolist() == table[start:].tolist()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loader_reads_the_plan(data, tmp_path, workers):
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    batches = read(dataset, workers)
    assert len(batches) == plan.steps == 2 * 93 // 4
    first_pack = plan.first_pack
    for batch, ids in zip(batches, plan.packs(0, plan.steps), strict=True):
        assert batch["streams"].tolist() == (np.searchsorted(first_pack, ids, side="right") - 1).tolist()
        assert batch["num_targets"] == batch["cu_seqlens"][-1] == batch["tokens"].numel()


def test_workers_continue_when_a_whole_job_is_asked_to_stop_and_end_with_the_loader(data, tmp_path):
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    batches = iter(data_spec(dataset, workers=2, timeout_seconds=20).dataloader)
    for _ in range(2):  # one from each: both have begun
        next(batches)
    workers = [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    assert len(list(batches)) == plan.steps - 2
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_signals_while_workers_start_stop_none_of_them_and_reach_the_one_that_starts_them(data, tmp_path, monkeypatch):
    def signalled(*_):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)

    def start(worker):
        signalled()
        original(worker)

    taken, original = Counter(), BaseProcess.start
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    monkeypatch.setattr(BaseProcess, "start", start)
    monkeypatch.setattr("streaming_rwkv.data.workers.die_with_parent", signalled)  # the first that a worker calls
    before = [signal.signal(number, lambda number, _: taken.update([number])) for number in STOP_SIGNALS]
    try:
        assert len(read(dataset, workers=2)) == plan.steps
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert taken.keys() == set(STOP_SIGNALS)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)


def test_a_process_that_fails_in_mid_iteration_does_not_wait_for_its_workers(data, tmp_path, programs):
    program = f"""
from tests.data.test_loader import data_spec, open_dataset
dataset, _, _ = open_dataset({str(data)!r}, {str(tmp_path / "cache")!r})
batches = iter(data_spec(dataset, workers=2, timeout_seconds=20).dataloader)
next(batches)
print("one batch", flush=True)
raise SystemExit(3)
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = programs.run([sys.executable, tmp_path / "program.py"], env=environment, timeout=250)
    assert (done.returncode, done.stdout) == (3, "one batch\n"), done.stderr


@pytest.mark.parametrize("workers", WORKERS)
def test_a_resumed_loader_starts_at_its_step(data, tmp_path, workers):
    dataset, _, _ = open_dataset(data, tmp_path / "cache", stages=({"passes": 1}, {"tokens": 3000, "min_length": 17}))
    whole = read(dataset, workers=0)
    dataset.start_at(17)
    part = read(dataset, workers)
    assert [b["tokens"].tolist() for b in part] == [b["tokens"].tolist() for b in whole[17:]]


def test_evaluation_sees_each_pack_once_and_fills_up_with_blanks(data, tmp_path):
    dataset, _, _ = open_dataset(data, tmp_path / "cache", split="validation")
    streams = [stream for batch in read(dataset, 0) for stream in batch["streams"].tolist()]
    assert streams == [0] * 5 + [1] * 4 + [-1] * 3


def test_evaluation_can_take_the_first_packs_of_each_stream():
    batches, count = evaluation_batches([5, 4], batch_packs=3, per_stream=2)
    assert batches(0, count).tolist() == [[0, 1, 5], [6, -1, -1]]


def test_each_shard_is_fetched_once_a_pass_with_a_small_cache(data, tmp_path, monkeypatch):
    fetched = []
    from streaming_rwkv.data.streaming_compat import VerifiedStream

    download = VerifiedStream._download_file

    def counted(self, basename, *rest):
        fetched.append(f"{self.remote}/{basename}")
        return download(self, basename, *rest)

    monkeypatch.setattr(VerifiedStream, "_download_file", counted)
    shards = read_manifest(data).select("train")
    largest = max(shard.raw_bytes + shard.bytes for stream in shards for shard in stream.shards)
    # Two shards of each of three streams are in use, and those of the next block are fetched ahead.
    indexes = sum((data / stream.path / "index.json").stat().st_size for stream in shards)
    dataset, _, _ = open_dataset(data, tmp_path / "cache", stages=({"passes": 1},), cache_limit=12 * largest + indexes)
    read(dataset, 0)
    assert len(fetched) == len(set(fetched)) == sum(len(stream.shards) for stream in shards)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("damage", ["missing", "flipped byte", "truncated", "empty", "of another stream"])
def test_a_damaged_shard_stops_the_run_by_name(data, tmp_path, workers, damage):
    shard = data / "train/web/1-16/shard.00001.mds.zstd"
    content = shard.read_bytes()
    match damage:
        case "missing":
            shard.unlink()
        case "flipped byte":
            shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        case "truncated":
            shard.write_bytes(content[:-7])
        case "empty":
            shard.write_bytes(b"")
        case "of another stream":
            shutil.copy(data / "train/code/1-16/shard.00000.mds.zstd", shard)
    dataset, _, _ = open_dataset(data, tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"train/web/1-16/shard.00001.mds.zstd.*(cannot be fetched|does not have the hash)"
    ):
        read(dataset, workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_shard_damaged_in_the_cache_is_fetched_again(data, tmp_path, workers):
    dataset, _, shard_set = open_dataset(data, tmp_path / "cache")
    before = [batch["tokens"].tolist() for batch in read(dataset, 0)]
    cached = sorted(shard_set.cache.rglob("*.mds"))
    assert len(cached) > 5
    for i, path in enumerate(cached):
        content = path.read_bytes()
        path.write_bytes(content[:-1] if i % 2 else content[:50] + b"\0\0\0" + content[53:])
    close(dataset, shard_set)
    again, _, _ = open_dataset(data, tmp_path / "cache")
    assert [batch["tokens"].tolist() for batch in read(again, workers)] == before


def close(dataset, shard_set):
    shard_set.lock.release()
    dataset.close()


def test_a_repaired_shard_is_used_by_the_next_run(data, tmp_path):
    shard = data / "train/web/1-16/shard.00000.mds.zstd"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    dataset, _, shard_set = open_dataset(data, tmp_path / "cache")
    with pytest.raises(DataError):
        read(dataset, 0)
    close(dataset, shard_set)
    shard.write_bytes(content)
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    assert len(read(dataset, 0)) == plan.steps


def test_the_data_set_itself_is_never_written_to(data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    dataset, _, _ = open_dataset(data, tmp_path / "cache")
    read(dataset, 0)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_data_set_that_was_iterated_here_can_be_iterated_by_workers(data, tmp_path):
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    read(dataset, 0)
    assert len(read(dataset, 2)) == plan.steps


def test_a_signal_to_the_ranks_group_does_not_reach_its_workers(data, tmp_path):
    dataset, plan, _ = open_dataset(data, tmp_path / "cache")
    batches = iter(data_spec(dataset, workers=2, timeout_seconds=20).dataloader)
    for _ in range(2):  # one from each: both have begun
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert {os.getpgid(worker.pid) for worker in workers} == {worker.pid for worker in workers}
    assert len(list(batches)) == plan.steps - 2


def test_a_cache_in_use_is_refused(data, tmp_path):
    _, _, holder = open_dataset(data, tmp_path / "cache")
    assert holder.lock is not None
    with pytest.raises(UserError, match=f"data cache is in use .*{os.getpid()}.*own `data.cache`"):
        open_dataset(data, tmp_path / "cache")


def test_a_closed_data_set_leaves_neither_open_files_nor_shared_memory(data, tmp_path):
    def opened():
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return Counter(
            (str(link.readlink()), link.stat().st_ino)
            for link in links
            if link.is_symlink() and "/dev/shm/" in str(link.readlink())
        )

    def there():
        found = set()
        for path in Path("/dev/shm").iterdir():
            with suppress(FileNotFoundError):  # another process's
                found.add((str(path), path.stat().st_ino))
        return found

    other, _, _ = open_dataset(data, tmp_path / "other")  # Streaming opens its shared memory too, and never closes it
    gc.collect()
    files = opened()
    assert files
    dataset, _, shard_set = open_dataset(data, tmp_path / "cache")
    assert read(dataset, 1)
    own = set(opened() - files)
    assert own
    assert own <= there()
    dataset.close()
    dataset.close()
    shard_set.lock.release()
    gc.collect()
    assert not opened() - files
    assert not own & there()
    assert len(read(other, 1)) == len(read(other, 0))


def test_runs_that_start_at_the_same_time_do_not_take_each_others_names(data, tmp_path):
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(4)

    def start_again_and_again(number):
        for _ in range(10):
            together.wait(200)
            dataset, _, shard_set = open_dataset(data, tmp_path / f"cache{number}")
            together.wait(200)
            dataset.close()
            shard_set.lock.release()

    starters = [fork.Process(target=start_again_and_again, args=(number,)) for number in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(250)
    assert [starter.exitcode for starter in starters] == [0] * 4


def test_no_lock_files_are_left_in_the_temporary_folder(data, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    dataset, _, _ = open_dataset(data, tmp_path / "cache")
    read(dataset, 2)
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("name", [MANIFEST_NAME, "train/web/1-16/index.json"])
def test_a_data_set_without_manifest_or_index_is_refused(data, tmp_path, name):
    (data / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        open_dataset(data, tmp_path / "cache")


def test_an_index_that_is_not_the_manifests_is_refused(data, tmp_path):
    index = data / "train/web/1-16/index.json"
    index.write_bytes(index.read_bytes().replace(b'"samples": 1', b'"samples": 2', 1))
    with pytest.raises(DataError, match="does not have the hash that the manifest gives"):
        open_dataset(data, tmp_path / "cache")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"ndarray:uint64"', b'"pkl"', "are not the contract's"),
        (b'"basename": "shard.00000.mds"', b'"basename": "../shard.00000.mds"', "raw file name"),
        (b'"basename": "shard.00000.mds"', b'"basename": "/tmp/evil.mds"', "raw file name"),
        (b'"compression": "zstd:3"', b'"compression": "gz:3"', "compression: found 'gz:3'"),
        (b'"samples": 1', b'"samples": 2', "does not list the manifest's shards"),
        (b'{"shards"', b'{"shard"', "shard: unknown key; did you mean 'shards'"),
        (b'{"shards": [', b'{"shards": 3, "x": [', "x: unknown key"),
    ],
)
def test_a_hostile_index_is_refused_whatever_the_manifest_says(built, old, new, message):
    manifest = read_manifest(built)
    record = next(stream for stream in manifest.streams if stream.path == "train/web/1-16")
    content = (built / record.path / "index.json").read_bytes()
    assert old in content
    check_index(content, record, vocab_size=manifest.tokenizer.vocab_size, where="index")
    with pytest.raises(DataError, match=message):
        check_index(content.replace(old, new, 1), record, vocab_size=manifest.tokenizer.vocab_size, where="index")


def test_a_compression_bomb_expands_no_further_than_the_index_says():
    import zstandard

    from streaming_rwkv.mds import expand

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    assert expand(bomb, 1000) is None
    assert expand(zstandard.ZstdCompressor().compress(b"pack"), 4) == b"pack"
    assert expand(zstandard.ZstdCompressor().compress(b"pack"), 5) is None
    assert expand(b"not zstd", 8) is None


@pytest.mark.parametrize("name", [MANIFEST_NAME, "train/web/1-16/index.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("kind", ["a named pipe", "a device or socket", "1,073,741,825 bytes"])
def test_a_file_that_would_fill_the_disk_or_never_end_is_refused(tmp_path, name, kind):
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    match kind:
        case "a named pipe":
            os.mkfifo(file)
        case "a device or socket":
            file.symlink_to("/dev/zero")
        case _:
            file.touch()
            os.truncate(file, 2**30 + 1)
    with pytest.raises(DataError) as caught:
        shard_set_module._fetch(str(tmp_path / "data"), None, name, to=tmp_path / "cache", timeout_seconds=60)
    assert str(caught.value) == (
        f"{file}: found {kind}, expected a regular file of at most 1,073,741,824 bytes; restore it"
    )
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("workers", WORKERS)
def test_a_cache_without_flock_is_shared_through_a_lock_elsewhere(data, tmp_path, workers, monkeypatch, caplog):
    cache = tmp_path / "cache"
    flock = fcntl.flock

    def without_locks_in_the_cache(descriptor, operation):
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(cache):
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", without_locks_in_the_cache)  # no such file system can be mounted here
    dataset, plan, _ = open_dataset(data, cache)
    assert f"{cache}: the file system has no locks (flock)" in caplog.text
    lock = Path(dataset._cache_filelock_path)
    assert lock.parent in (Path("/dev/shm"), Path(tempfile.gettempdir()))
    assert len(read(dataset, workers)) == plan.steps
    lock.unlink(missing_ok=True)


def test_a_machine_without_any_flock_is_told_what_to_set(tmp_path, monkeypatch):
    def without_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without_locks)
    (tmp_path / "cache").mkdir()
    with pytest.raises(UserError, match=r"cache: loader processes share this data cache, but its file system has no"):
        streaming_compat._lock_path(tmp_path / "cache" / ".lock", RUN_SETTINGS)


def test_a_batch_that_memory_cannot_hold_is_refused():
    record = stream("web", 256, 10, targets_per_pack=1 << 40)
    with pytest.raises(
        UserError, match=r"^`data\.batch_tokens` or `data\.batch_packs`: each process reads 1,048,576 packs"
    ):
        check_batch_fits([record], packs=1 << 20, names=RUN_SETTINGS)
