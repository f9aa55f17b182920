"""Whole runs that are profiled, that skip spikes, and that leave steps out on purpose."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.train.callbacks.small_tasks import write_task
from tests.train.small_runs import STEPS, TRAIN, VALIDATION, SmallRuns, assert_same_end, copy_until, losses, mark_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def train(
    write_data_set: Callable[..., Path], programs: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> SmallRuns:
    data = write_data_set(tmp_path_factory.mktemp("watching") / "data", TRAIN, validation=VALIDATION)
    return SmallRuns(data, programs)


@pytest.fixture(scope="module")
def plain(train: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    status, output = train(run)
    assert status == 0, output
    return run


def test_a_profile_has_a_trace_of_each_rank_and_changes_no_bit(train: SmallRuns, plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = train(run, "profile={steps: [3, 4], memory: true}", "on_spike={norm_over: 1.0e+9}")
    assert status == 0, output
    assert losses(run) == losses(plain)
    assert_same_end(run, plain)
    assert len(mark_of(run)["gradient_norms"]) == STEPS
    with gzip.open(run / "profile" / "steps-3-4" / "rank-0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum("AdamW.step" in name for name in names) == 2
    status, output = train(tmp_path / "two", "profile={steps: [14, 99]}", processes=2)  # ends within the steps
    assert status == 0, output
    traces = sorted(path.name for path in (tmp_path / "two" / "profile" / "steps-14-99").iterdir())
    assert traces == ["rank-0.json.gz", "rank-1.json.gz"]


def test_a_run_that_skips_spikes_resumes_with_its_median(train: SmallRuns, plain: Path, tmp_path: Path) -> None:
    # With so small a rate the norms differ by the packs of the steps alone: about half of them are above the median.
    settings = ["on_spike={norm_over: 1.001, window: 8}", "optimizer.lr=1.0e-7", "optimizer.lr_final=1.0e-8"]
    status, output = train(tmp_path / "run", *settings)
    assert status == 0, output
    skipped = mark_of(tmp_path / "run")["steps_skipped"]
    assert 0 < skipped < STEPS
    assert output.count("times the running median") == skipped
    resumed = copy_until(tmp_path / "run", 5, tmp_path / "resumed")
    status, output = train(resumed, *settings)
    assert status == 0, output
    assert losses(resumed) == losses(tmp_path / "run") != losses(plain)
    assert_same_end(resumed, tmp_path / "run")
    assert mark_of(resumed)["gradient_norms"] == mark_of(tmp_path / "run")["gradient_norms"]


def test_tasks_change_no_bit_and_a_resumed_run_scores_no_checkpoint_again(
    train: SmallRuns, plain: Path, tmp_path: Path
) -> None:
    kind = 'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_choice: choices\ndoc_to_target: label\n'
    questions = [("", ["w3", "w5"], 0), ("", ["w7", "w2"], 1)]
    write_task(tmp_path / "tasks", "words", kind + 'target_delimiter: ""\nmetric_list: [{metric: acc}]\n', questions)
    settings = [f"evaluation={{interval_steps: 5, tasks: [words], task_folder: {tmp_path / 'tasks'}}}"]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    status, output = train(tmp_path / "run", *settings, environment=environment)
    assert status == 0, output
    assert losses(tmp_path / "run") == losses(plain)
    assert_same_end(tmp_path / "run", plain)
    scored = accuracies(tmp_path / "run")
    assert [step for step, _ in scored] == [5, 10, 15]
    resumed = copy_until(tmp_path / "run", 10, tmp_path / "resumed")
    status, output = train(resumed, *settings, environment=environment)
    assert status == 0, output
    assert accuracies(resumed) == scored
    assert_same_end(resumed, plain)


def accuracies(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tasks/words/acc"]) for line in lines if "tasks/words/acc" in line]


def test_a_run_goes_back_and_leaves_steps_out(train: SmallRuns, plain: Path, tmp_path: Path) -> None:
    run = copy_until(plain, 5, tmp_path / "run")
    status, output = train(run, "data.skip_steps=[[7, 8], [12, 12]]")
    assert status == 0, output
    assert losses(run)[:7] == losses(plain)[:7]  # the loss of step 7 is that before its update
    assert losses(run)[7] != losses(plain)[7]
    assert mark_of(run)["steps_skipped"] == 3
    assert mark_of(run)["tokens"] == mark_of(plain)["tokens"]
    again = copy_until(run, 10, tmp_path / "again")
    status, output = train(again)
    assert status == 1
    assert "skip_steps: the checkpoint has [[7, 8]], this run null" in output
    status, output = train(again, "data.skip_steps=[[7, 8], [12, 12]]")
    assert status == 0, output
    assert_same_end(again, run)
