"""Whole runs that branch from a checkpoint of another run, on disk and in object storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.train.small_runs import STEPS, TRAIN, VALIDATION, SmallRuns, assert_same_end, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(write_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("branches") / "data", TRAIN, validation=VALIDATION)


@pytest.fixture(scope="module")
def train(data: Path, programs: ForkServer) -> SmallRuns:
    return SmallRuns(data, programs)


@pytest.fixture(scope="module")
def parent(train: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("parent") / "run"
    status, output = train(run)
    assert status == 0, output
    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_a_branch_with_the_same_settings_is_its_parent(
    processes: int, train: SmallRuns, parent: Path, tmp_path: Path
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
    train: SmallRuns, parent: Path, tmp_path: Path
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


def test_a_finished_parent_leaves_nothing_to_train(train: SmallRuns, parent: Path, tmp_path: Path) -> None:
    status, output = train(tmp_path / "branch", f"branch_from={parent}")
    assert status == 1
    assert "has taken all 15 steps of these settings; name an earlier checkpoint" in output


def test_a_branch_from_object_storage_is_its_parent(
    train: SmallRuns, parent: Path, s3_place: str, tmp_path: Path
) -> None:
    there, run = tmp_path / "there", tmp_path / "branch"
    status, output = train(there, f"save_remote={s3_place}/parent")
    assert status == 0, output
    status, output = train(run, f"branch_from={s3_place}/parent@step-00000010", f"save_remote={s3_place}/branch")
    assert status == 0, output
    assert_same_end(run, parent)
    assert not (run / "branch_from").exists()
