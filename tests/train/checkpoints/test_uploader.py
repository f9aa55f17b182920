"""A run's folder on object storage, through a real server: a checkpoint is complete or absent after any fault."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from composer.core import State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.marked_files import CheckpointError, MarkedFile
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.storage import StorageError, Store, open_store
from streaming_rwkv.train.callbacks.checkpointing import Checkpointer
from streaming_rwkv.train.callbacks.clipping import ClipGradient
from streaming_rwkv.train.callbacks.consumption import Consumption
from streaming_rwkv.train.checkpoints.local import install, newest_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress, mark_content
from streaming_rwkv.train.checkpoints.remote import newest_remote
from streaming_rwkv.train.checkpoints.restore import _run_of, check_place, local_checkpoint, restore
from streaming_rwkv.train.checkpoints.uploader import Mirror, MirrorError
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import OptimizerConfig, RunConfig
from streaming_rwkv.train.optimizer import build_optimizer
from tests.fault_proxy import Fault, FaultProxy
from tools.ports import free_ports
from tools.s3_server import S3Server

TIMEOUT = 4.0  # where the storage gives up; it says how long it takes: a quarter more
BUSY = 200.0  # seconds that a machine may need for all else: still below the 300 of a run that sets nothing
PATIENT = 60.0  # where it must not, on a machine that is busy with other tests too
WAITED_FOR = 12.0  # the same where a server that stands still is given up: after a quarter of it
FILES = [".metadata", "__0_0.distcp", "complete.json"]


def files(step: int) -> dict[str, bytes]:
    return {".metadata": f"index of {step}".encode(), "__0_0.distcp": random.Random(step).randbytes(100_000)}


def save(folder: Path, step: int) -> Path:
    """A whole checkpoint and the log of its run; what its files hold is no matter here."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    final = folder / "checkpoints" / f"step-{step:08}"
    writing = final.with_name(f".{final.name}.tmp")
    writing.mkdir(parents=True)
    records = {}
    for name, content in files(step).items():
        (writing / name).write_bytes(content)
        records[name] = MarkedFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    progress = Progress(step=step, tokens=0, samples=0, slots=0, seconds=0, consumed={})
    install(writing, final, mark_content(run={}, progress=progress, files=records))
    return final


def send(store: Store, checkpoint: Path, *, keep: int = 0, keep_every: int | None = None) -> None:
    mirror = Mirror(store, checkpoint.parent.parent, keep=keep, keep_every=keep_every)
    mirror.begin(checkpoint)
    mirror.finish()


def assert_restored(store: Store, folder: Path, *, step: int) -> None:
    """The checkpoint comes back to the last bit."""
    checkpoint, in_store = restore(store, folder)
    assert checkpoint is not None
    assert (checkpoint.step, in_store) == (step, True)
    assert {name: (checkpoint.path / name).read_bytes() for name in checkpoint.mark.files} == files(step)


def steps_in(store: Store) -> list[int]:
    return sorted({int(name.split("/")[1].removeprefix("step-")) for name in store.list("checkpoints/")})


def files_of(store: Store, step: int) -> list[str]:
    folder = f"checkpoints/step-{step:08}/"
    return [name.removeprefix(folder) for name in store.list(folder)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The save folder of a machine that is new."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def store(s3_place: str) -> Iterator[Store]:
    store = open_store(s3_place, timeout_seconds=20)
    yield store
    store.close()


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def faulty(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same store through the proxy."""
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    proxy.clear()
    faulty = open_store(store.location, timeout_seconds=PATIENT)
    yield faulty
    faulty.close()


@contextlib.contextmanager
def opened_for(faulty: Store, kind: str) -> Iterator[Store]:
    """The store with a patience that outlasts faults of this kind, on a busy machine too."""
    store = open_store(faulty.location, timeout_seconds=WAITED_FOR if kind in ("silent", "slow") else PATIENT)
    yield store
    store.close()


@pytest.fixture
def hasty(faulty: Store) -> Iterator[Store]:
    """The same store through the proxy, with a short time-out."""
    hasty = open_store(faulty.location, timeout_seconds=TIMEOUT)
    yield hasty
    hasty.close()


def test_a_checkpoint_and_the_logs_come_back_on_an_empty_machine(store: Store, folder: Path, empty: Path) -> None:
    (folder / "config.yaml").write_text("seed: 17\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_bytes(b"some")
    (folder / "cache").mkdir()
    (folder / "cache" / "shard").write_bytes(b"not ours to keep")
    send(store, save(folder, 5))
    assert files_of(store, 5) == FILES
    assert [name for name in store.list() if "checkpoints/" not in name] == [
        "config.yaml", "metrics.jsonl", "tensorboard/events"
    ]  # fmt: skip
    assert_restored(store, empty, step=5)
    for name in ("config.yaml", "metrics.jsonl", "tensorboard/events", "checkpoints/step-00000005/complete.json"):
        assert (empty / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in (empty / "checkpoints").iterdir()) == ["step-00000005"]


def test_a_place_that_is_not_in_object_storage_is_refused() -> None:
    values = {
        "save_folder": "run",
        "save_remote": "/data",
        "data": {"path": "data", "batch_packs": 1, "stages": [{"passes": 1}]},
        "model": {},
    }
    with pytest.raises(ConfigError, match=r"run\.yaml: save_remote: found '/data'; expected s3://bucket/prefix"):
        validate(RunConfig, values, where="run.yaml")


def test_with_an_empty_store_a_run_starts_afresh(store: Store, empty: Path) -> None:
    assert restore(store, empty) == (None, False)


def test_the_newer_of_the_local_and_the_stored_checkpoint_is_used(store: Store, folder: Path, empty: Path) -> None:
    send(store, save(folder, 5))
    save(folder, 7)
    checkpoint, in_store = restore(store, folder)
    assert checkpoint is not None
    assert (checkpoint.step, in_store) == (7, False)
    save(empty, 3)  # an older machine
    assert_restored(store, empty, step=5)
    assert (empty / "metrics.jsonl").read_text() == '{"step": 5}\n'


def test_a_newer_local_checkpoint_is_uploaded_whichever_ranks_wrote_it(store: Store, folder: Path) -> None:
    path = save(folder, 5)
    (path / "__0_0.distcp").rename(path / "__3_0.distcp")  # as rank 3 of a larger world wrote it
    mark = json.loads((path / "complete.json").read_text())
    mark["files"]["__3_0.distcp"] = mark["files"].pop("__0_0.distcp")
    (path / "complete.json").write_text(json.dumps(mark))
    mirror = Mirror(store, folder, keep=0)
    mirror.begin(path, all_on_rank_zero=True)
    mirror.finish()
    assert files_of(store, 5) == [".metadata", "__3_0.distcp", "complete.json"]


def test_the_newest_are_kept_and_interrupted_uploads_before_them_are_removed(store: Store, folder: Path) -> None:
    for step in (1, 2, 3):
        send(store, save(folder, step), keep=2)
    assert steps_in(store) == [2, 3]
    store.put_bytes(b"", "checkpoints/step-00000004/uploading.0")
    store.put_bytes(b"half", "checkpoints/step-00000004/__0_0.distcp")
    store.put_bytes(b"of a later step", "checkpoints/step-00000009/uploading.0")
    send(store, save(folder, 5), keep=0)
    assert steps_in(store) == [2, 3, 5, 9]
    send(store, save(folder, 6), keep=1)
    assert steps_in(store) == [6, 9]


def test_checkpoints_of_every_nth_step_stay_in_the_store_too(store: Store, folder: Path) -> None:
    for step in (2, 4, 6, 8):
        send(store, save(folder, step), keep=1, keep_every=4)
    assert steps_in(store) == [4, 8]
    send(store, save(folder, 10), keep=1, keep_every=4)
    assert steps_in(store) == [4, 8, 10]


def test_of_two_runs_in_one_place_the_later_continues(store: Store, folder: Path, empty: Path, tmp_path: Path) -> None:
    first, second = Mirror(store, folder, keep=0), Mirror(store, empty, keep=0)
    first.take_over()
    first.begin(save(folder, 5))
    assert first.settle()
    second.take_over()
    first.begin(save(folder, 6))
    assert not first.settle()
    refusal = rf"step-00000006 could not be uploaded: .*writer.json: another run .*\"process\": {os.getpid()}"
    with pytest.raises(MirrorError, match=refusal):
        first.finish()
    with pytest.raises(MirrorError, match="another run has taken over this place"):
        first.send_logs()
    assert steps_in(store) == [5]
    second.begin(save(empty, 7))
    second.finish()
    assert steps_in(store) == [5, 7]
    assert_restored(store, tmp_path / "third", step=7)


def test_a_run_continues_after_its_claim_was_removed(store: Store, folder: Path) -> None:
    mirror = Mirror(store, folder, keep=0)
    mirror.take_over()
    store.delete(["writer.json"])
    mirror.begin(save(folder, 5))
    mirror.finish()
    assert steps_in(store) == [5]


def test_an_interrupted_upload_is_not_a_checkpoint(store: Store, folder: Path, empty: Path) -> None:
    store.put_bytes(b"", "checkpoints/step-00000005/uploading.0")
    store.put_bytes(b"half", "checkpoints/step-00000005/__0_0.distcp")
    assert restore(store, empty) == (None, False)
    send(store, save(folder, 5))
    assert files_of(store, 5) == FILES
    assert_restored(store, empty, step=5)


def lose(store: Store, name: str) -> None:
    store.delete([f"checkpoints/step-00000005/{name}"])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("complete.json", None, r"step-00000005: no completion mark"),
        ("complete.json", b"{}", r"step-00000005: .*not of the format"),
        ("__0_0.distcp", None, r"step-00000005: __0_0.distcp has no bytes instead of"),
        ("__0_0.distcp", b"short", r"step-00000005: __0_0.distcp has 5 bytes instead of"),
    ],
)
def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_afresh(
    name: str,
    content: bytes | None,
    text: str,
    store: Store,
    folder: Path,
    empty: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(store, save(folder, 5))
    lose(store, name)
    if content is not None:
        store.put_bytes(content, f"checkpoints/step-00000005/{name}")
    with pytest.raises(CheckpointError, match=rf"{store.location}/checkpoints: no checkpoint here is whole \({text}"):
        restore(store, empty)
    assert list(empty.rglob("step-*")) == []
    checkpoint, in_store = restore(store, folder)  # where it is complete
    assert checkpoint is not None
    assert (checkpoint.step, in_store) == (5, False)
    send(store, save(folder, 4))
    with caplog.at_level(logging.WARNING):
        assert_restored(store, empty, step=4)
    assert "going back to step-00000004" in caplog.text


def test_content_that_was_damaged_in_the_bucket_is_named_and_not_installed(
    store: Store, folder: Path, empty: Path
) -> None:
    path = save(folder, 5)
    send(store, path)
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[100] ^= 1
    lose(store, "__0_0.distcp")
    store.put_bytes(bytes(content), "checkpoints/step-00000005/__0_0.distcp")
    with pytest.raises(StorageError, match=r"step-00000005/__0_0\.distcp: fetched twice, and its checksum"):
        restore(store, empty)
    assert not (empty / "checkpoints" / "step-00000005").exists()


def test_a_file_that_a_local_checkpoint_lost_is_fetched(
    store: Store, folder: Path, proxy: FaultProxy, faulty: Store
) -> None:
    path = save(folder, 5)
    send(store, path)
    (path / ".metadata").unlink()
    proxy.requests()
    assert_restored(faulty, folder, step=5)
    fetched = [url.partition("?")[0].rpartition("/")[2] for method, url, _ in proxy.requests() if method == "GET"]
    assert ".metadata" in fetched
    assert "__0_0.distcp" not in fetched


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil"])
def test_a_mark_that_names_files_elsewhere_is_refused(name: str, store: Store, folder: Path, empty: Path) -> None:
    path = save(folder, 5)
    mark = json.loads((path / "complete.json").read_text())
    mark["files"][name] = {"bytes": 4, "sha256": "0" * 64}
    store.put_bytes(json.dumps(mark).encode(), "checkpoints/step-00000005/complete.json")
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        restore(store, empty)


def test_checkpoints_in_object_storage_can_be_named_by_run_or_step(store: Store, folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    for step in (4, 5):
        send(store, save(folder, step))
    for location, step in ((store.location, 5), (f"{store.location}/checkpoints/step-00000004", 4), (folder, None)):
        with local_checkpoint(location) as path:
            assert step is None or (path / "__0_0.distcp").read_bytes() == files(step)["__0_0.distcp"]
            assert step is None or (path.parents[1] / "tokenizer" / "tokenizer.json").read_text() == "{}"
        assert path.exists() == (step is None)
    with (
        pytest.raises(CheckpointError, match=r"step-00000009: no checkpoint of a run here"),
        local_checkpoint(f"{store.location}/checkpoints/step-00000009"),
    ):
        pass


def test_two_runs_do_not_share_a_place(store: Store, folder: Path, empty: Path) -> None:
    send(store, save(folder, 5))
    save(empty, 7)
    with pytest.raises(CheckpointError, match=rf"{store.location}/checkpoints/step-00000005: made by a run with other"):
        check_place(store, {"data": "77aa"}, allow=frozenset())
    check_place(store, {"data": "77aa"}, allow=frozenset({"data"}))
    check_place(store, {}, allow=frozenset())


PASSING = [
    *(Fault(kind="status", status=status, times=3) for status in (429, 500, 503)),
    *(Fault(kind=kind, method="PUT", times=2) for kind in ("reset upload", "flip upload", "lose answer")),
    Fault(kind="silent", method="PUT", times=1),
    Fault(kind="reset", method="GET", times=2),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.name)
def test_a_fault_that_passes_changes_nothing(
    fault: Fault, faulty: Store, proxy: FaultProxy, folder: Path, empty: Path
) -> None:
    before = proxy.counts()[fault.name]
    proxy.add(fault)
    path = save(folder, 5)
    with opened_for(faulty, fault.kind) as patient:
        send(patient, path)
        assert_restored(patient, empty, step=5)
    assert proxy.counts()[fault.name] - before == fault.times
    assert files_of(faulty, 5) == FILES


@pytest.mark.parametrize("kind", ["flip", "truncate", "shorten", "reset", "slow", "silent", "lose answer"])
def test_a_passing_fault_during_a_download_changes_nothing(
    kind: str, store: Store, faulty: Store, proxy: FaultProxy, folder: Path, empty: Path
) -> None:
    send(store, save(folder, 5))
    names = ("distcp", "complete") if kind in ("slow", "silent") else ("distcp", "complete", "metrics")
    proxy.add(*(Fault(kind=kind, method="GET", path=name, times=1) for name in names))  # type: ignore[arg-type]
    with opened_for(faulty, kind) as patient:
        assert_restored(patient, empty, step=5)
    assert (empty / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


LASTING = [
    (Fault(kind="status", status=503, method="PUT"), "the server answers 503 SlowDown"),
    (Fault(kind="status", status=403, method="PUT"), "403 AccessDenied: refused; check AWS_ACCESS_KEY_ID"),
    (Fault(kind="status", status=404), "404 NoSuchBucket: there is no such bucket"),
    (Fault(kind="reset upload", method="PUT"), "the connection broke"),
    (Fault(kind="flip upload", method="PUT"), "refused|BadDigest|differs from what was sent|SignatureDoesNotMatch"),
    (Fault(kind="silent", method="PUT"), "timed out, since the server stopped responding"),
]


@pytest.mark.parametrize(("fault", "text"), LASTING, ids=lambda value: value.name if isinstance(value, Fault) else "")
def test_a_fault_that_lasts_is_one_error_in_time_and_nothing_is_lost(
    fault: Fault, text: str, store: Store, faulty: Store, hasty: Store, proxy: FaultProxy, folder: Path, empty: Path
) -> None:
    send(store, save(folder, 4))
    path = save(folder, 5)
    proxy.add(fault)
    began = time.monotonic()
    with pytest.raises(MirrorError, match=rf"step-00000005 could not be uploaded: s3://.*({text}).*Nothing is lost on"):
        send(hasty, path)
    assert time.monotonic() - began < 1.25 * TIMEOUT + BUSY
    assert_restored(store, empty, step=4)
    proxy.clear()
    send(faulty, path)
    shutil.rmtree(empty)
    assert_restored(store, empty, step=5)


def test_a_run_whose_upload_fails_saves_locally_and_stops_with_the_cause(
    faulty: Store, proxy: FaultProxy, folder: Path
) -> None:
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    model = RWKV7ForTraining(network, num_streams=1, flops_per_token=1)
    optimizers = build_optimizer(network, OptimizerConfig())
    state = State(
        model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="9ba", optimizers=optimizers
    )
    logger = Logger(state)
    consumption = Consumption([], interval_steps=1, last_step=100)
    consumption.fit_start(state, logger)
    mirror = Mirror(faulty, folder, keep=2)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        interval_steps=2,
        keep=2,
        last_step=9,
        run={},
        slots_before=lambda step: step,
        consumption=consumption,
        clipping=ClipGradient(1.0, on_nonfinite="skip"),
        mirror=mirror,
    )

    def end_of_step(step: int) -> None:
        state.timestamp = Timestamp(batch=step)
        checkpointer.batch_checkpoint(state, logger)

    for step in (1, 2, 3):
        end_of_step(step)
    assert mirror.settle()
    assert steps_in(faulty) == [2]
    proxy.add(Fault(kind="status", status=403, method="PUT"))
    end_of_step(4)  # training continues meanwhile
    while not mirror.failed:
        time.sleep(0.05)
    with pytest.raises(MirrorError, match=r"step-00000004 could not be uploaded: s3://\S+: .*403 .*Nothing is lost on"):
        end_of_step(5)
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.step == 5
    proxy.clear()
    again = Mirror(faulty, folder, keep=2)
    again.begin(newest.path, all_on_rank_zero=True)
    again.finish()
    assert steps_in(faulty) == [2, 5]


def test_an_upload_cut_off_after_any_request_leaves_the_last_or_the_new_checkpoint(
    store: Store, faulty: Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    """Cut the upload off, as a kill of the client between any two requests would."""
    send(store, save(folder, 4), keep=1)
    path = save(folder, 5)
    restored = []
    for requests in range(100):
        proxy.clear()
        proxy.add(Fault(kind="status", status=403, skip=requests))
        try:
            send(faulty, path, keep=1)
        except MirrorError:
            done = False
        else:
            done = True
        remote = newest_remote(store)
        assert remote is not None
        restored.append(remote.step)
        assert_restored(store, tmp_path / f"machine-{requests}", step=remote.step)
        if done:
            break
    assert restored == sorted(restored)
    assert set(restored) == {4, 5}
    assert steps_in(store) == [5]
    assert files_of(store, 5) == FILES


@pytest.mark.slow
@pytest.mark.alone  # the server must be back before patience ends
def test_a_server_killed_and_started_again_in_an_upload_changes_nothing(
    store: Store, folder: Path, empty: Path, s3_server: S3Server
) -> None:
    mirror = Mirror(store, folder, keep=1)
    for step in (1, 2, 3):
        mirror.begin(save(folder, step))
        if step == 2:
            s3_server.kill()
            time.sleep(1)
            s3_server.start()
        mirror.finish()
    assert steps_in(store) == [3]
    assert_restored(store, empty, step=3)


@pytest.mark.slow
def test_nodes_without_a_common_disk_upload_their_parts_and_fetch_the_whole(store: Store, tmp_path: Path) -> None:
    port = str(free_ports(1)[0])
    worker = Path(__file__).with_name("mirror_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), port, tmp_path / f"node{rank}", store.location],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error for _, error in outputs)
    assert [json.loads(output.splitlines()[-1]) for output, _ in outputs] == [
        [".metadata", "__0_0.distcp", "complete.json"],
        ["__1_0.distcp", "complete.json"],
    ]
    assert files_of(store, 7) == [".metadata", "__0_0.distcp", "__1_0.distcp", "complete.json"]


@pytest.mark.parametrize(
    ("location", "run", "step"),
    [
        ("s3://b/runs/a", "s3://b/runs/a", None),
        ("s3://b/runs/a/", "s3://b/runs/a", None),
        ("s3://b/runs/a/checkpoints/step-00000010", "s3://b/runs/a", 10),
        ("s3://b/checkpoints/stage1", "s3://b/checkpoints/stage1", None),
        ("s3://b/checkpoints/stage1/checkpoints/step-00000010/", "s3://b/checkpoints/stage1", 10),
    ],
)
def test_a_location_names_a_run_or_one_of_its_checkpoints(location: str, run: str, step: int | None) -> None:
    with _run_of(location) as (store, found):
        assert (store.url("x"), found) == (f"{run}/x", step)
