"""`open_dataset`: the packs that training reads, for any rank, number of workers and first step."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.config import UserError, validate
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.loader import pack_loader
from streaming_rwkv.data.setting_names import ARGUMENTS
from streaming_rwkv.data.steps import StepDataset, open_dataset
from streaming_rwkv.data.workers import explain_dead_worker
from streaming_rwkv.shards import DataError
from streaming_rwkv.train.config import RunConfig
from streaming_rwkv.train.datasets import open_training_packs
from streaming_rwkv.train.prepare import prepare
from tests.fork_server import ForkServer
from tools.ports import free_ports

TRAIN = {("web", 1, 16): 24, ("web", 17, 32): 20, ("code", 1, 16): 16}
VALIDATION = {("web", 1, 16): 4, ("code", 1, 16): 3}
STAGES = [{"tokens": 1000, "sources": {"web": 0.5, "code": 0.5}}, {"passes": 1.3}, {"tokens": 600, "min_length": 17}]
Packs = list[list[int]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path]) -> Path:
    return write_data_set(tmp_path_factory.mktemp("steps") / "data", TRAIN, validation=VALIDATION)


def packs_of(batch: Batch) -> Packs:
    bounds = batch["pack_starts"].tolist()
    return [batch["tokens"][0, low:high].tolist() for low, high in itertools.pairwise(bounds)]


def read(dataset: StepDataset) -> list[Packs]:
    with dataset:
        return [packs_of(batch) for batch in dataset]


def read_as_training(data: Path, folder: Path, *, rank: int, world_size: int, fraction: float = 1.0) -> list[Packs]:
    """What a rank of `composer train.py` reads; the cache is locked until the caller's next collection of garbage."""
    values = {
        "save_folder": str(folder),
        "seed": 5,
        "data": {"path": str(data), "stages": STAGES, "batch_packs": 4, "fraction": fraction},
        "model": {"hidden_size": 64, "num_layers": 1},
    }
    prepared = prepare(validate(RunConfig, values, where="test"), world_size=world_size, fetch=True)
    packs = open_training_packs(prepared)
    packs.rank, packs.num_ranks = rank, world_size
    try:
        return [packs_of(batch) for batch in pack_loader(packs, workers=0, timeout_seconds=60)]
    finally:
        packs.close()
        assert prepared.shard_set.lock is not None
        prepared.shard_set.lock.release()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_reads_the_packs_that_it_trains_on(data: Path, world_size: int, tmp_path: Path) -> None:
    for rank in range(world_size):
        expected = read_as_training(data, tmp_path / f"{rank}", rank=rank, world_size=world_size)
        assert len(expected) == 26
        given = {"stages": STAGES, "batch_packs": 4, "seed": 5, "rank": rank, "world_size": world_size}
        for workers in (0, 2) if rank == world_size - 1 else (0,):
            assert read(open_dataset(data, workers=workers, **given)) == expected  # type: ignore[arg-type]
        middle = 5 * (rank + 1)
        assert read(open_dataset(data, workers=0, start_step=middle, **given)) == expected[middle:]  # type: ignore[arg-type]


def test_a_fraction_reads_the_packs_that_a_run_on_it_trains_on(data: Path, tmp_path: Path) -> None:
    expected = read_as_training(data, tmp_path / "part", rank=1, world_size=2, fraction=0.25)
    found = read(
        open_dataset(data, stages=STAGES, batch_packs=4, seed=5, rank=1, world_size=2, workers=0, fraction=0.25)
    )
    assert found == expected
    with open_dataset(data, batch_packs=1, workers=0, fraction=0.25) as part:
        assert len(part) == 6 + 5 + 4  # a quarter of each stream's packs


@pytest.fixture
def dataset(data: Path) -> Iterator[StepDataset]:
    with open_dataset(data, batch_packs=4, workers=0) as opened:
        yield opened


def test_the_state_is_the_step(dataset: StepDataset, data: Path) -> None:
    assert len(dataset) == 15
    batches = iter(dataset)
    taken = [packs_of(next(batches)) for _ in range(4)]
    assert dataset.state_dict() == {"step": 4} == json.loads(json.dumps(dataset.state_dict()))
    rest = [packs_of(batch) for batch in dataset]  # a new iteration continues
    with pytest.raises(ValueError, match="this iteration has ended: a newer one began"):  # not as if the data had ended
        next(batches)
    assert dataset.state_dict() == {"step": 15}
    assert list(dataset) == []
    dataset.load_state_dict({"step": 4})
    assert [packs_of(batch) for batch in dataset] == rest
    dataset.start_at(0)
    assert [packs_of(batch) for batch in dataset] == taken + rest
    assert len(dataset) == 15


@pytest.mark.parametrize("state", [{"step": 16}, {"step": -1}, {"step": 1.0}, {"step": True}, {"step": "1"}])
def test_a_state_of_another_dataset_is_refused(dataset: StepDataset, state: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^state: step: found .*, expected a whole number from 0 to 15"):
        dataset.load_state_dict(state)


@pytest.mark.parametrize(
    ("state", "found"), [({"step": 1, 0: 0}, r"the keys \['0', 'step'\]"), (None, "a NoneType"), ([1], "a list")]
)
def test_what_is_no_state_is_refused(dataset: StepDataset, state: Any, found: str) -> None:
    with pytest.raises(UserError, match=rf"^state: found {found}, expected 'step' alone; give what `state_dict`"):
        dataset.load_state_dict(state)


def test_a_batch_says_which_stream_each_pack_is_of(dataset: StepDataset) -> None:
    batch = next(iter(dataset))
    assert set(batch) == {"tokens", "targets", "cu_seqlens", "pack_starts", "streams", "text_bytes", "num_targets"}
    assert batch["tokens"].shape == batch["targets"].shape == (1, batch["num_targets"])
    assert (batch["tokens"].dtype, batch["cu_seqlens"].dtype) == (torch.int64, torch.int32)
    assert batch["cu_seqlens"][-1] == batch["num_targets"]
    assert [(stream.source, stream.bucket) for stream in dataset.streams] == [
        ("web", "1-16"), ("web", "17-32"), ("code", "1-16")
    ]  # fmt: skip
    for stream, pack in zip(batch["streams"].tolist(), itertools.pairwise(batch["pack_starts"].tolist()), strict=True):
        bounds = batch["cu_seqlens"]
        lengths = bounds[(bounds >= pack[0]) & (bounds <= pack[1])].diff()
        assert dataset.streams[stream].lower <= lengths.min()
        assert lengths.max() <= dataset.streams[stream].upper


def test_training_and_validation_are_open_together_and_keep_their_cache(data: Path, tmp_path: Path) -> None:
    with (
        open_dataset(data, batch_packs=1, cache=tmp_path / "cache", workers=0) as train,
        open_dataset(data, batch_packs=1, cache=tmp_path / "cache", workers=0, split="validation") as validation,
    ):
        assert (len(train), len(list(validation))) == (60, 7)
        with pytest.raises(UserError, match=r"this data cache is in use .* give this run its own `cache`$"):
            open_dataset(data, batch_packs=1, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "validation").rglob("*.mds"))


def test_closing_ends_workers_and_removes_a_temporary_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dataset = open_dataset(data, batch_packs=4, workers=1)
    batches = iter(dataset)  # kept: an iteration that is not finished
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    assert list(tmp_path.rglob("*.mds"))
    dataset.close()
    dataset.close()
    assert multiprocessing.active_children() == []
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="closed"):
        iter(dataset)
    with pytest.raises(ValueError, match=r"this iteration has ended: .* the dataset was closed"):
        next(batches)


def test_a_worker_that_cannot_be_started_is_reported_with_the_argument(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: BaseProcess) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(BaseProcess, "start", refuse)
    with (
        open_dataset(data, batch_packs=4, workers=1) as dataset,
        pytest.raises(UserError, match=r"^workers: loader process 1 of 1 .*, or set `workers` lower$"),
    ):
        next(iter(dataset))


def test_a_killed_worker_is_reported_with_the_argument() -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert str(explain_dead_worker(error, names=ARGUMENTS)) == (
        "workers: loader process 7 was ended by signal Killed; most often the machine or the container ran out of "
        "memory (see dmesg): give the job more, or set `workers` lower; a dataset that is opened with `start_step` "
        "continues"
    )


def test_a_launchers_environment_changes_nothing_without_a_process_group(
    data: Path, dataset: StepDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming would wait for the other ranks."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert read(open_dataset(data, batch_packs=4, workers=0)) == [packs_of(batch) for batch in dataset]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "open_dataset: give either `batch_tokens` or `batch_packs`, the size of a step over all ranks"),
        ({"batch_packs": 0}, "open_dataset: batch_packs: found 0; Input should be greater than 0"),
        (
            {"batch_packs": 4, "fraction": 1.5},
            "open_dataset: fraction: found 1.5; Input should be less than or equal to 1",
        ),
        ({"batch_packs": 4, "rank": 1}, "open_dataset: give both `rank` and `world_size`, or neither"),
        ({"batch_packs": 4, "rank": 2, "world_size": 2}, "open_dataset: rank: found 2, expected 0 to 1"),
        ({"batch_packs": 10**12}, "open_dataset: batch_packs: found 1000000000000; Input should be less than or equal"),
        (
            {"batch_packs": 1 << 21},
            "open_dataset: batch_packs: found 2,097,152, which is 2,097,152 packs in a step; exp",
        ),
        ({"batch_packs": 4, "workers": 1000}, "open_dataset: workers: found 1000; Input should be less than or equal "),
        ({"batch_packs": 3, "rank": 0, "world_size": 2}, "open_dataset: batch_packs: 3 packs do not divide among 2 "),
        ({"batch_packs": 4, "stages": []}, "open_dataset: stages: found []; List should have at least 1 item"),
        ({"batch_packs": 4, "stages": [{"pases": 1}]}, "open_dataset: stages.0.pases: unknown key; did you mean 'pass"),
        (
            {"batch_packs": 4, "stages": [{"tokens": 99, "sources": {"web": 1, "cod": 1}}]},
            "open_dataset: stages.0.sources.cod: not in this selection of the data; there are code, web",
        ),
        ({"batch_packs": 4, "cache_limit": 99}, "open_dataset: cache_limit: found 99 bytes, but at least "),
        (
            {"batch_packs": 4, "start_step": 16},
            "open_dataset: start_step: found 16, expected a whole number from 0 to 15",
        ),
        ({"batch_packs": 4, "stages": None}, "open_dataset: stages: found None; Input should be a valid list"),
        ({"batch_packs": 4, "location": None}, "open_dataset: location: found None; Input should be a valid string"),
        ({"batch_packs": True}, "open_dataset: batch_packs: found 'true'; Input should be a valid integer"),
        ({"batch_packs": 4, "seed": True}, "open_dataset: seed: found 'true'; Input should be a valid integer"),
        ({"batch_packs": 4, "fraction": True}, "open_dataset: fraction: found 'true'; Input should be a valid number"),
        ({"batch_packs": 4, "cache": 5}, "open_dataset: cache: found 5; Input should be a valid string"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(data: Path, arguments: dict[str, object], error: str) -> None:
    with pytest.raises(UserError) as raised:
        open_dataset(**({"location": data} | arguments))  # type: ignore[arg-type]
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_a_forked_process_neither_reads_a_dataset_nor_closes_it(data: Path, tmp_path: Path) -> None:
    with open_dataset(data, batch_packs=4, workers=1) as dataset:
        batches = iter(dataset)
        next(batches)
        there, here = multiprocessing.Pipe()

        def child() -> None:
            for read in (lambda: next(batches), lambda: iter(dataset)):
                try:
                    read()
                except ValueError as error:
                    here.send(str(error))
            dataset.close()
            batches.end()  # type: ignore[attr-defined]  # as the garbage collector does
            here.send("closed")

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        answers = [there.recv() for _ in range(3)]
        process.join()
        assert answers == ["this dataset was opened in another process; open one here, with its `step`"] * 2 + [
            "closed"
        ]
        assert process.exitcode == 0
        assert len(list(batches)) == len(dataset) - 1  # with the same loader process


def test_a_dataset_is_not_sent_to_another_process(dataset: StepDataset) -> None:
    with pytest.raises(TypeError, match="an open dataset cannot be sent to another process; open one there, with"):
        pickle.dumps(dataset)


def test_a_shard_that_is_no_file_is_named(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = sorted(copy.rglob("*.mds.zstd"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DataError, match=rf"{shard.relative_to(copy)} \(not a regular file\)"):
        open_dataset(copy, batch_packs=1)


def test_a_location_without_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing, so this is not a finished data set; .*, or fix `location`$"):
        open_dataset(tmp_path, batch_packs=1)


def test_a_data_set_without_validation_packs_is_named(tmp_path: Path, write_data_set: Callable[..., Path]) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 4})
    with pytest.raises(UserError, match=r"^open_dataset: .* has no validation packs; choose another `split`"):
        open_dataset(data, batch_packs=1, split="validation")


def test_a_cache_with_other_files_is_refused_and_an_earlier_one_is_not(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "mine"
    (cache / "train").mkdir(parents=True)
    (cache / "train" / "manifest.json").write_text("mine")
    with pytest.raises(UserError, match=r"mine/train: has manifest\.json, but is no earlier data cache; give another"):
        open_dataset(data, batch_packs=1, cache=cache)
    assert os.listdir(cache / "train") == ["manifest.json"]
    for _ in range(2):
        open_dataset(data, batch_packs=1, cache=tmp_path / "cache").close()


def test_a_cache_among_the_files_of_a_data_set_or_a_run_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for cache, found in ((data, "which is a data set"), (tmp_path / "run", "is a run's save folder")):
        with pytest.raises(UserError, match=f"{cache}: .*{found}.*; give another `cache`$"):
            open_dataset(data, batch_packs=1, cache=cache)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.slow
def test_ranks_of_a_process_group_share_a_cache(data: Path, programs: ForkServer, tmp_path: Path) -> None:
    with open_dataset(data, batch_packs=4, workers=0) as dataset:
        expected = [packs_of(batch) for batch in dataset]
    worker = Path(__file__).with_name("steps_worker.py")
    port = str(free_ports(1)[0])
    running = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, str(worker), str(data), str(tmp_path / "cache"), str(tmp_path / f"{rank}.json")]
        running.append(programs.popen(command, env=environment))
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == expected
    assert len(list((tmp_path / "cache" / "train").glob("*/train"))) == 1
