"""HSDP, `parallel.replicas`: two replicas of two shards train as four shards do, and their checkpoints interchange."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.train.small_runs import STEPS, TRAIN, SmallRuns, copy_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

REPLICAS = "parallel.replicas=2"


@pytest.fixture(scope="module")
def train(
    write_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, programs: ForkServer
) -> SmallRuns:
    return SmallRuns(write_data_set(tmp_path_factory.mktemp("replicas") / "data", TRAIN), programs)


@pytest.fixture(scope="module")
def sharded(train: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four processes, FSDP over all."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    status, output = train(run, processes=4)
    assert status == 0, output
    return run


@pytest.fixture(scope="module")
def replicated(train: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as two replicas of two shards."""
    run = tmp_path_factory.mktemp("replicated") / "run"
    status, output = train(run, REPLICAS, processes=4)
    assert status == 0, output
    return run


def measured(run: Path) -> dict[int, tuple[float, float]]:
    """Return the loss and the norm of the gradient of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/train/total" in line]
    return {line["step"]: (line["loss/train/total"], line["optimizer/gradient_norm"]) for line in steps}


def assert_same_training(run: Path, expected: Path) -> None:
    """Compare all steps: (a + b) + (c + d) rounds unlike gloo's sum over four ranks, here by 2e-7 and 4e-6.

    A gradient that leaves out a replica, or has another divisor, differs in the first digit of the norm.
    """
    wanted, found = measured(expected), measured(run)
    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    for step, (loss, norm) in wanted.items():
        assert found[step] == (pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-4)), step


def resumed(train: SmallRuns, run: Path, to: Path, *settings: str, step: int, processes: int) -> Path:
    """Return a copy of a run that continued from the checkpoint of `step`."""
    copy_until(run, step, to)
    status, output = train(to, *settings, processes=processes)
    assert status == 0, output
    assert f"resuming from {to}/checkpoints/step-{step:08}" in output
    return to


def test_two_replicas_train_like_one(sharded: Path, replicated: Path) -> None:
    assert_same_training(replicated, sharded)


def test_checkpoints_interchange(train: SmallRuns, sharded: Path, replicated: Path, tmp_path: Path) -> None:
    assert_same_training(resumed(train, sharded, tmp_path / "a", REPLICAS, step=5, processes=4), sharded)
    assert_same_training(resumed(train, replicated, tmp_path / "b", step=10, processes=4), sharded)
    assert_same_training(resumed(train, replicated, tmp_path / "c", step=5, processes=1), sharded)


def test_a_number_of_processes_that_does_not_divide_is_refused_once(train: SmallRuns, tmp_path: Path) -> None:
    status, output = train(tmp_path / "run", "parallel.replicas=3", processes=2)
    assert status == 1
    assert output.count("parallel.replicas: found 3, but the number of processes, 2, is not a multiple of it;") == 1
    assert "loading torch" not in output
