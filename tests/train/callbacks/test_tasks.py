"""Standard tasks at evaluations: scores of the weights of that step; the training is left as it is."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_rwkv.config import ConfigError, UserError, validate
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.callbacks.tasks import TaskScores, load_tasks
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import EvaluationConfig
from streaming_rwkv.train.early_checks import check_tasks
from tests.fork_server import ForkServer
from tests.train.callbacks.small_tasks import (
    KINDS,
    QUESTIONS,
    import_harness,
    network,
    save_words,
    state_of,
    write_task,
)

# The harness and its requirements deprecate each other's names.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _harness(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("lm_eval", reason="comes with the extra `tasks`, and with `dev`")
    import_harness(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    for name, text in KINDS.items():
        write_task(place, name, text)
    return place


def configured(**values: Any) -> EvaluationConfig:
    return validate(EvaluationConfig, values, where="evaluation")


@torch.no_grad()
def likelier(question: str, choices: list[str], words: Path) -> int:
    """The choice that the model finds likelier, each asked alone."""
    model, tokenizer = network(), load_tokenizer(words)
    context = tokenizer.encode(question).tolist()
    found = []
    for choice in choices:
        tokens = [tokenizer.bos_id, *context, *tokenizer.encode(choice).tolist()]
        logits = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        found.append(sum(float(logits[i, tokens[i + 1]]) for i in range(len(context), len(tokens) - 1)))
    return found.index(max(found))


def test_a_run_logs_the_scores_of_its_weights_and_is_left_as_it_was(words: Path, tmp_path: Path) -> None:
    asked = [(question, choices, likelier(question, choices, words)) for question, choices, _ in QUESTIONS]
    asked[0] = (*asked[0][:2], 1 - asked[0][2])  # one answer of five is wrong
    for name, kind in KINDS.items():
        write_task(tmp_path / "tasks", name, kind, asked)
    config = configured(tasks=["choices", "words", "texts"], task_folder=str(tmp_path / "tasks"))
    model = RWKV7ForTraining(network(), num_streams=1, flops_per_token=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, logger, logged = state_of(model, step=500)
    scores = TaskScores(config, load_tasks(config), tokenizer_folder=words, last_step=700)
    scores.fit_start(state, logger)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = [random.random(), np.random.random(), float(torch.rand(()))]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    for is_training in (True, False):
        model.train(is_training)
        scores.eval_end(state, logger)
        assert model.training is is_training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        if is_training:
            first = dict(logged)
    assert [random.random(), np.random.random(), float(torch.rand(()))] == expected
    assert logged == first  # sampled texts too
    assert first["tasks/choices/acc"] == 0.8
    assert 0 <= first["tasks/words/exact_match"] <= 1
    assert first["tasks/texts/bits_per_byte"] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("step", "is_scored"), [(500, False), (1000, True), (1500, False), (1700, True)])
def test_tasks_come_at_their_own_interval_and_at_the_last_step(
    step: int, is_scored: bool, words: Path, folder: Path
) -> None:
    config = configured(tasks=["choices"], task_folder=str(folder), task_interval_steps=1000, task_limit=2)
    model = RWKV7ForTraining(network(), num_streams=1, flops_per_token=1)
    state, logger, logged = state_of(model, step=step)
    scores = TaskScores(config, load_tasks(config), tokenizer_folder=words, last_step=1700)
    scores.fit_start(state, logger)
    scores.eval_end(state, logger)
    assert ("tasks/choices/acc" in logged) is is_scored
    assert logged.get("tasks/choices/acc", 0) in (0, 0.5, 1)  # of two documents


def test_what_is_missing_is_one_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_tasks(configured()) is None
    write_task(tmp_path / "tasks", "choices", KINDS["choices"])
    (tmp_path / "tasks" / "choices.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*give tasks with local files by evaluation\.task_folder"):
        load_tasks(configured(tasks=["choices"], task_folder=str(tmp_path / "tasks")))
    check_tasks(configured(tasks=["choices"], task_folder=str(folder)))
    with pytest.raises(ConfigError, match=r"evaluation\.task_folder: .*nowhere: no such folder"):
        check_tasks(configured(tasks=["choices"], task_folder=str(tmp_path / "nowhere")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: the package 'lm_eval' is not installed; run .*tasks"):
        check_tasks(configured(tasks=["choices"]))
    check_tasks(configured())


def test_tasks_are_scored_at_evaluations_alone() -> None:
    assert configured(task_interval_steps=1000).task_interval_steps == 1000
    with pytest.raises(ConfigError, match=r"task_interval_steps: found 700, .*every 500 steps.*such as 1000"):
        configured(task_interval_steps=700)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_find_exactly_the_scores_of_one(programs: ForkServer, words: Path, tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        write_task(tmp_path / "tasks", name, kind)
    long = [(" ".join([question] * 300), choices, label) for question, choices, label in QUESTIONS]
    write_task(tmp_path / "tasks", "rows", KINDS["choices"], long)
    command = [
        "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2",
        str(Path(__file__).with_name("tasks_worker.py")), str(tmp_path), str(words),
    ]  # fmt: skip
    done = programs.run([sys.executable, *command], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
