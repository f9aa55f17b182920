"""Packs from a real S3 server with a fault in between: those without the fault, or one error in the stated time."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, training_batches
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.shards import DataError, read_manifest, sha256_of_file
from streaming_rwkv.storage import open_store
from tests.fault_proxy import Fault, FaultProxy, Kind
from tools.s3_server import S3Server

TRAIN = {("web", 1, 16): 88, ("code", 17, 32): 30}
SHARD_NAME = r"shard\.\d+\.mds\.zstd"
SHARD = r"\.mds\.zstd"
TIMEOUT = 4.0  # where the storage gives up: an attempt after a quarter of it without a step forward
BUSY = 90.0  # seconds that a machine may need for all else: still below the 120 of a run that sets nothing
PATIENT = 60.0  # where it must not, on a machine that is busy with other tests too
WAITED_FOR = 12.0  # the same where a server that stands still is given up: after a quarter of it
Tokens = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A data set, here and in a bucket, and a proxy before it."""

    local: Path
    location: str
    expected: Tokens
    proxy: FaultProxy

    @property
    def shards(self) -> int:
        return sum(len(stream.shards) for stream in read_manifest(self.local).streams)


def upload(folder: Path, location: str) -> None:
    store = open_store(location)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_file(path, path.relative_to(folder).as_posix(), sha256=sha256_of_file(path))
    store.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path]) -> tuple[Path, Tokens]:
    folder = write_data_set(tmp_path_factory.mktemp("built") / "data", TRAIN, packs_per_shard=4)
    with opened(folder, tmp_path_factory.mktemp("cache")) as dataset:
        return folder, read(dataset, 0)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def uploaded(s3_server: S3Server, built: tuple[Path, Tokens]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        upload(built[0], "s3://tests/read-through-faults")
    return "s3://tests/read-through-faults"


@pytest.fixture
def place(
    s3_place: str, built: tuple[Path, Tokens], uploaded: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    proxy.clear()
    proxy.requests()
    yield Place(local=built[0], location=uploaded, expected=built[1], proxy=proxy)
    proxy.accept()


class opened:
    """The data set at a location, with nothing left open afterwards."""

    def __init__(self, location: str | Path, cache: Path, *, timeout: float = PATIENT, **options: Any) -> None:
        self.shard_set = open_shard_set(location, cache=cache, splits=("train",), timeout_seconds=timeout, fetch=True)
        records = self.shard_set.manifest.select("train")
        plan = make_plan([StageConfig(passes=2)], records, batch_packs=4, seed=3, block_shards=2)
        batches, num_batches = training_batches(plan)
        self.dataset = PackDataset(
            self.shard_set, records, batches=batches, num_batches=num_batches, batch_packs=4,
            options=LoaderOptions(
                fetch_ahead=8, cache_limit=options.get("cache_limit"), download_attempts=2, timeout_seconds=timeout,
            ),
        )  # fmt: skip

    def __enter__(self) -> PackDataset:
        return self.dataset

    def __exit__(self, *_: object) -> None:
        self.dataset.close()
        if self.shard_set.lock is not None:
            self.shard_set.lock.release()
        if self.shard_set.store is not None:
            self.shard_set.store.close()


def read(dataset: PackDataset, workers: int, *, timeout: float = PATIENT) -> Tokens:
    return [
        batch["tokens"].tolist() for batch in data_spec(dataset, workers=workers, timeout_seconds=timeout).dataloader
    ]


# A body that breaks off again and again comes whole in the end: each attempt resumes where the last one stopped.
PASSING: list[Fault] = [
    *(Fault(kind="status", status=status, path=SHARD, times=3) for status in (429, 500, 503)),
    *(Fault(kind=kind, path=SHARD, times=2) for kind in ("reset", "truncate", "lose answer")),
    *(Fault(kind=kind, path=SHARD, times=1) for kind in ("shorten", "flip", "silent", "slow")),
]


# Without workers, one for each way in which a fault is noticed: an answer, a broken connection, bytes, silence.
PASSING_CASES = [
    pytest.param(fault, workers, id=f"{fault.name}-{workers}")
    for fault in PASSING
    for workers in (0, 2)
    if workers or fault.name in ("status 503", "reset", "flip", "silent")
]


@pytest.mark.parametrize(("fault", "workers"), PASSING_CASES)
def test_a_fault_that_passes_changes_nothing(fault: Fault, workers: int, place: Place, tmp_path: Path) -> None:
    before = place.proxy.counts()[fault.name]
    place.proxy.add(fault)
    timeout = WAITED_FOR if fault.kind in ("silent", "slow") else PATIENT
    with opened(place.location, tmp_path / "cache", timeout=timeout) as dataset:
        assert read(dataset, workers, timeout=timeout) == place.expected
    assert place.proxy.counts()[fault.name] - before == fault.times


LASTING: list[tuple[Fault, str]] = [
    (Fault(kind="status", status=500, path=SHARD), "the server answers 500 InternalError"),
    (Fault(kind="status", status=403, path=SHARD), "403 AccessDenied: refused; check AWS_ACCESS_KEY_ID"),
    (Fault(kind="status", status=404, path=SHARD), "404 NoSuchBucket: there is no such bucket"),
    (Fault(kind="lose answer", path=SHARD), "the connection broke"),
    (Fault(kind="shorten", path=SHARD), "fetched twice, and its checksum"),
    (Fault(kind="flip", path=SHARD), "fetched twice, and its checksum"),
    (Fault(kind="slow", path=SHARD), "timed out, since the server stopped responding"),
    (Fault(kind="silent", path=SHARD), "timed out, since the server stopped responding"),
]
FAST = {("flip", 2), ("status 403", 0), ("status 403", 2), ("slow", 2)}


def lasting_cases() -> Iterator[Any]:
    for fault, text in LASTING:
        for workers in (0, 2):
            if workers == 2 or fault.name in ("slow", "status 403", "flip"):
                marks = [] if (fault.name, workers) in FAST else [pytest.mark.slow]
                yield pytest.param(fault, text, workers, marks=marks, id=f"{fault.name}-{workers}")


@pytest.mark.parametrize(("fault", "text", "workers"), list(lasting_cases()))
def test_a_fault_that_lasts_is_one_error_in_time(
    fault: Fault, text: str, workers: int, place: Place, tmp_path: Path
) -> None:
    place.proxy.add(fault)
    with opened(place.location, tmp_path / "cache", timeout=TIMEOUT) as dataset:
        began = time.monotonic()
        with pytest.raises(DataError, match=text) as caught:
            read(dataset, workers, timeout=TIMEOUT)
        # Once ahead of its time, once when it is needed.
        assert time.monotonic() - began < 2 * 1.25 * TIMEOUT + BUSY
    message = str(caught.value)
    assert message.startswith(place.location)
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_refused_connections_that_come_back_change_nothing(workers: int, place: Place, tmp_path: Path) -> None:
    with opened(place.location, tmp_path / "cache") as dataset:
        place.proxy.refuse()
        timer = threading.Timer(1.5, place.proxy.accept)
        timer.start()
        assert read(dataset, workers) == place.expected
        timer.join()


@pytest.mark.slow
@pytest.mark.alone  # the server must be back before patience ends
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_killed_and_started_again_changes_nothing(
    workers: int, place: Place, tmp_path: Path, s3_server: S3Server
) -> None:
    with opened(place.location, tmp_path / "cache", timeout=40) as dataset, ThreadPoolExecutor(1) as reader:
        s3_server.kill()
        seen = reader.submit(read, dataset, workers, timeout=40)
        time.sleep(1)
        s3_server.start()  # by this thread, with which it will end
        assert seen.result() == place.expected


MANIFEST = r"manifest\.json$"


@pytest.mark.parametrize("kind", ["reset", "truncate", "shorten", "flip", "slow"])
def test_manifest_and_indexes_are_read_through_passing_faults(kind: Kind, place: Place, tmp_path: Path) -> None:
    place.proxy.add(Fault(kind=kind, path=MANIFEST, times=1), Fault(kind=kind, path=r"index\.json$", times=1))
    timeout = WAITED_FOR if kind == "slow" else PATIENT
    with opened(place.location, tmp_path / "cache", timeout=timeout) as dataset:
        assert dataset.manifest == read_manifest(place.local)
    assert [fault for _, _, fault in place.proxy.requests()].count(kind) == 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            Fault(kind="status", status=403, path=MANIFEST),
            r"manifest\.json: .*403 AccessDenied: refused; check AWS_ACC",
        ),
        (Fault(kind="status", status=404), r"manifest\.json: .*404 NoSuchBucket: there is no such bucket; create it"),
        (Fault(kind="flip", path=MANIFEST), r"manifest\.json: fetched twice, and its checksum"),
        (Fault(kind="silent", path=MANIFEST), r"manifest\.json: .*timed out, since the server stopped responding"),
        (Fault(kind="flip", path="index"), r"index\.json: fetched twice, and its checksum"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_data_set_that_cannot_be_read_is_refused_before_the_first_step(
    fault: Fault, text: str, place: Place, tmp_path: Path
) -> None:
    place.proxy.add(fault)
    began = time.monotonic()
    with pytest.raises(DataError, match=text):
        open_shard_set(place.location, cache=tmp_path, splits=("train",), timeout_seconds=TIMEOUT, fetch=True)
    assert time.monotonic() - began < 1.25 * TIMEOUT + BUSY


def test_a_location_without_a_data_set_is_named(place: Place, s3_place: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"{s3_place}/manifest.json: missing, so this is not a finished data set; build"
    ):
        open_shard_set(s3_place, cache=tmp_path, splits=("train",), timeout_seconds=TIMEOUT, fetch=True)


def test_wrong_keys_are_named(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-wrong-one")
    with pytest.raises(DataError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_shard_set(place.location, cache=tmp_path, splits=("train",), timeout_seconds=TIMEOUT, fetch=True)
    assert "the-wrong-one" not in str(caught.value)


def test_an_object_without_its_writers_checksum_is_compared_with_the_index(
    place: Place, s3_server: S3Server, s3_place: str, tmp_path: Path
) -> None:
    """Objects that another program uploaded have no checksum of the writer: only the index reveals a flipped bit."""
    bucket, _, prefix = s3_place.removeprefix("s3://").partition("/")
    with s3_server.client() as client:
        for path in place.local.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(place.local).as_posix()}")
    place.proxy.add(Fault(kind="flip", path=SHARD, times=1))
    with opened(s3_place, tmp_path / "cache") as dataset:
        assert read(dataset, 0) == place.expected
    place.proxy.add(Fault(kind="flip", path=SHARD))
    with (
        opened(s3_place, tmp_path / "other") as dataset,
        pytest.raises(DataError, match=r"fetched twice, and its checksum \(sha256\) is not the expected"),
    ):
        read(dataset, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_small_cache_each_shard_is_fetched_once_a_pass(workers: int, place: Place, tmp_path: Path) -> None:
    records = read_manifest(place.local).select("train")
    largest = max(shard.raw_bytes + shard.bytes for record in records for shard in record.shards)
    indexes = sum((place.local / record.path / "index.json").stat().st_size for record in records)
    limit = 6 * largest + indexes  # what both workers fetch ahead, and the blocks that are open
    assert place.shards > 10
    cache = tmp_path / "cache"
    with opened(place.location, cache, cache_limit=limit) as dataset:
        assert read(dataset, workers) == place.expected
        kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert kept <= limit
    fetched = [path for method, path, _ in place.proxy.requests() if method == "GET" and "mds.zstd" in path]
    assert place.shards < len(fetched) <= 2 * place.shards  # in two passes


def test_repeated_reads_through_faults_leak_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    beside_shards = []
    for _ in range(3):
        place.proxy.clear()
        place.proxy.add(
            Fault(kind="reset", path=SHARD, chance=0.2, times=2),
            # Of different shards: one that comes damaged twice in a row is an error.
            Fault(kind="flip", path=f"web/1-16/{SHARD_NAME}", times=1),
            Fault(kind="shorten", path=f"code/17-32/{SHARD_NAME}", times=1),
        )
        with opened(place.location, cache) as dataset:
            assert read(dataset, 2) == place.expected
        beside_shards.append({path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".mds"})
        shutil.rmtree(next(path for path in cache.iterdir() if path.is_dir()) / "train" / "web")  # to be fetched again
    assert beside_shards[0] == beside_shards[2] == {"manifest.json", "index.json", ".lock", ".train.lock"}
    assert os.listdir(temporary) == []
    for path in Path("/dev/shm").iterdir():
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):  # another process's
            if path.stat().st_size < 1 << 20:  # ours are small; another's may be gigabytes
                assert str(cache).encode() not in path.read_bytes(), path


def test_files_that_a_kill_left_unfinished_in_the_cache_are_removed(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with opened(place.location, cache) as dataset:
        folder = Path(dataset.streams[0].local)
    for name in (".shard.00000.mds.tmp", ".index.json.tmp"):
        (folder / name).write_bytes(b"half of it")
    with opened(place.location, cache) as dataset:
        assert sorted(os.listdir(folder)) == ["index.json"]
