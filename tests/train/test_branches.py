"""Whole runs that branch from a checkpoint of another run, on disk and in object storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from streaming_rwkv.model.weights import read_state
from streaming_rwkv.train.checkpoints.record import read_mark
from tests.fork_server import ForkServer
from tests.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS = 15  # one pass over 60 packs, 4 to a step
SETTINGS = [
    "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.stages.0.passes=1", "data.workers=0",
    "checkpoint.interval_steps=5", "checkpoint.keep=1", "checkpoint.keep_every=5", "log.tensorboard=false",
]  # fmt: skip

Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def data(write_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {("web", 1, 16): 24, ("web", 17, 32): 20, ("code", 1, 16): 16}
    return write_data_set(tmp_path_factory.mktemp("branches") / "data", train, validation={("web", 1, 16): 4})


@pytest.fixture(scope="module")
def train(data: Path, programs: ForkServer) -> Train:
    def run(
        save_folder: Path, *overrides: str, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        command = [
            Path(sys.executable).with_name("composer"), "-n", str(processes), "--master_port", str(free_ports(1)[0]),
            "train.py", "yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={save_folder}",
            *SETTINGS, *overrides,
        ]  # fmt: skip
        save_folder.mkdir(parents=True, exist_ok=True)
        log = save_folder / "output"
        with open(log, "wb") as output:
            environment = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"}
            program = programs.popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            status = program.wait(timeout=600)
        return status, log.read_text()

    return run


@pytest.fixture(scope="module")
def parent(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("parent") / "run"
    status, output = train(run)
    assert status == 0, output
    return run


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/train/total"]) for line in lines if "loss/train/total" in line]


def assert_same_end(run: Path, parent: Path) -> None:
    last = f"checkpoints/step-{STEPS:08}"
    weights, expected = read_state(run / last), read_state(parent / last)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    mark, of_parent = read_mark(run / last), read_mark(parent / last)
    assert [mark[key] for key in ("tokens", "samples", "slots", "consumed", "run")] == [
        of_parent[key] for key in ("tokens", "samples", "slots", "consumed", "run")
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_branch_with_the_same_settings_is_its_parent(
    processes: int, train: Train, parent: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    status, output = train(run, f"branch_from={parent}@step-00000005", processes=processes)
    assert status == 0, output
    assert f"branching from {parent}@step-00000005 at step 5" in output
    assert [step for step, _ in losses(run)] == list(range(6, STEPS + 1))
    if processes == 1:  # two processes sum in another order
        assert losses(run) == losses(parent)[5:]
        assert_same_end(run, parent)
    status, output = train(run, f"branch_from={parent}@step-00000005")  # now it resumes from its own
    assert status == 0, output
    assert f"{run}/checkpoints/step-00000015: this run is finished" in output


def test_another_mixture_or_schedule_is_refused_unless_it_is_allowed(
    train: Train, parent: Path, tmp_path: Path
) -> None:
    changes = [f"branch_from={parent}@step-00000010", "data.stages.0.passes=1.5", "optimizer.lr_final=1.0e-4"]
    status, output = train(tmp_path / "branch", *changes)
    assert status == 1
    assert "\n  mixture: the checkpoint has " in output
    assert "\n  optimizer: the checkpoint has " in output
    assert "checkpoint.allow_changed=[mixture,optimizer]" in output
    status, output = train(tmp_path / "branch", *changes, "checkpoint.allow_changed=[mixture,optimizer]")
    assert status == 0, output
    assert [step for step, _ in losses(tmp_path / "branch")] == list(range(11, 23))  # 90 packs, 4 to a step


def test_a_finished_parent_leaves_nothing_to_train(train: Train, parent: Path, tmp_path: Path) -> None:
    status, output = train(tmp_path / "branch", f"branch_from={parent}")
    assert status == 1
    assert "has taken all 15 steps of these settings; name an earlier checkpoint" in output


def test_a_branch_from_object_storage_is_its_parent(train: Train, parent: Path, s3_place: str, tmp_path: Path) -> None:
    there, run = tmp_path / "there", tmp_path / "branch"
    status, output = train(there, f"save_remote={s3_place}/parent")
    assert status == 0, output
    status, output = train(run, f"branch_from={s3_place}/parent@step-00000010", f"save_remote={s3_place}/branch")
    assert status == 0, output
    assert_same_end(run, parent)
    assert not (run / "branch_from").exists()
