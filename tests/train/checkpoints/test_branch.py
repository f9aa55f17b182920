"""Branches: where a checkpoint is looked for, and what a branch is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.marked_files import CheckpointError, MarkedFile
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.train.checkpoints.branch import branch_mark, checkpoint_location, fetch_branch, remove_copy
from streaming_rwkv.train.checkpoints.local import save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress, mark_content, parse_mark
from streaming_rwkv.train.checkpoints.restore import check_same_settings
from streaming_rwkv.train.config import OptimizerConfig, RunConfig
from streaming_rwkv.train.optimizer import build_optimizer


def save(run: Path, *steps: int) -> None:
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    optimizer = build_optimizer(network, OptimizerConfig())
    for step in steps:
        progress = Progress(step=step, tokens=10 * step, samples=step, slots=step, seconds=0, consumed={})
        save_checkpoint(
            run / "checkpoints", model=network, optimizer=optimizer, progress=progress, run={"data": "8d1f"}, keep=0
        )


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    save(run, 5, 10)
    return run


@pytest.mark.parametrize(
    ("branch_from", "location"),
    [
        ("runs/a@step-00010000", "runs/a/checkpoints/step-00010000"),
        ("runs/a/@step-00010000", "runs/a/checkpoints/step-00010000"),
        ("s3://bucket/a@step-00010000", "s3://bucket/a/checkpoints/step-00010000"),
        ("runs/a", "runs/a"),
        ("runs/me@home", "runs/me@home"),
        ("runs/a/checkpoints/step-00010000", "runs/a/checkpoints/step-00010000"),
    ],
)
def test_a_step_behind_an_at_names_a_checkpoint(branch_from: str, location: str) -> None:
    assert checkpoint_location(branch_from) == location


def test_the_checkpoint_is_read_where_it_is(parent: Path, tmp_path: Path) -> None:
    save_folder = tmp_path / "branch"
    for branch_from, step in ((f"{parent}@step-00000005", 5), (str(parent), 10)):
        found = fetch_branch(branch_from, save_folder, save_remote=None)
        assert (found.step, found.path) == (step, parent / "checkpoints" / f"step-{step:08}")
        assert branch_mark(branch_from) == found.mark
    remove_copy(save_folder)
    assert not save_folder.exists()


def test_the_record_of_the_memory_trial_is_no_link_of_a_stranger(parent: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parent, tmp_path / "copy"))
    (tmp_path / "secret").write_text("secret")
    (copy / "microbatch.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"branch_from: .*microbatch\.json: found a symbolic link"):
        fetch_branch(str(copy), tmp_path, save_remote=None)
    (copy / "microbatch.json").unlink()
    (copy / "microbatch.json").write_text("{}")
    fetch_branch(str(copy), tmp_path, save_remote=None)
    assert (tmp_path / "microbatch.json").read_text() == "{}"


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(parent: Path, tmp_path: Path) -> None:
    message = "@step-00000007: no such checkpoint; found step-00000005, step-00000010"
    for ask in (branch_mark, lambda place: fetch_branch(place, tmp_path, save_remote=None)):
        with pytest.raises(CheckpointError, match=message):
            ask(f"{parent}@step-00000007")  # type: ignore[operator]


def test_weights_without_a_step_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pth").touch()
    with pytest.raises(CheckpointError, match=r"model\.pth: not a run's checkpoint, .*`model\.init_from`"):
        fetch_branch(str(tmp_path / "model.pth"), tmp_path / "branch", save_remote=None)


def test_a_damaged_checkpoint_is_refused(parent: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(parent, tmp_path / "a"))
    (run / "checkpoints" / "step-00000005" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"a@step-00000005: __0_0\.distcp is missing; name another checkpoint"):
        fetch_branch(f"{run}@step-00000005", tmp_path / "branch", save_remote=None)


def test_the_parents_place_in_object_storage_is_refused(parent: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(parent, tmp_path / "a"))
    (run / "config.yaml").write_text("save_remote: s3://bucket/a/\n")
    with pytest.raises(CheckpointError, match=r"save_remote: s3://bucket/a is that of .*/a, whose checkpoints"):
        fetch_branch(f"{run}@step-00000005", tmp_path / "branch", save_remote="s3://bucket/a")
    assert fetch_branch(f"{run}@step-00000005", tmp_path / "branch", save_remote="s3://bucket/b").step == 5


@pytest.mark.parametrize("content", ["a: !!bool maybe", "a: !!timestamp noon", "a: 2020-13-45", "[" * 5000, "\xff"])
def test_a_parents_configuration_that_no_run_wrote_is_ignored(parent: Path, content: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(parent, tmp_path / "a"))
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    assert fetch_branch(str(run), tmp_path / "branch", save_remote="s3://bucket/b").step == 10


def test_the_parents_trial_of_memory_is_taken_over(parent: Path, tmp_path: Path) -> None:
    run, save_folder = Path(shutil.copytree(parent, tmp_path / "a")), tmp_path / "branch"
    (run / "microbatch.json").write_text("{}")
    save_folder.mkdir()
    fetch_branch(str(run), save_folder, save_remote=None)
    assert (save_folder / "microbatch.json").read_text() == "{}"


def test_other_settings_are_refused_by_name() -> None:
    of_parent = {"mixture": [{"tokens": 1}], "optimizer": {"lr": 1}}
    progress = Progress(step=5, tokens=10, samples=5, slots=5, seconds=0, consumed={})
    files = {"a": MarkedFile(bytes=1, sha256="0" * 64)}
    mark = parse_mark(mark_content(run=of_parent, progress=progress, files=files), where="runs/a")
    run = {"mixture": [{"tokens": 2}], "optimizer": {"lr": 2}}

    def check(*allowed: str) -> None:
        check_same_settings(mark, run, allow=frozenset(allowed), where="runs/a", branching=True)

    with pytest.raises(CheckpointError) as caught:
        check()
    assert str(caught.value).endswith(
        'mixture: the checkpoint has [{"tokens": 1}], this run [{"tokens": 2}]\n'
        '  optimizer: the checkpoint has {"lr": 1}, this run {"lr": 2}\n'
        "Set the value back, or, if the change is meant, say checkpoint.allow_changed=[mixture,optimizer]"
    )
    check("mixture", "optimizer")


def settings(**changes: Any) -> dict[str, Any]:
    data = {"path": "d", "batch_packs": 1, "stages": [{"passes": 1}]}
    return {"save_folder": "runs/b", "data": data, "model": {"preset": "0.1B"}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_from": "runs/a@step-12"}, r"branch_from: found 'runs/a@step-12'; expected RUN@step-00010000"),
        ({"branch_from": "gs://bucket/a"}, r"branch_from: .*scheme 'gs' is not supported"),
        ({"branch_from": "runs/../runs/b@step-00000012"}, r"the run in `save_folder` itself; a branch needs"),
        (
            {"branch_from": "s3://bucket/a@step-00000012", "save_remote": "s3://bucket/a/"},
            r"the run in `save_remote` itself; a branch needs a `save_remote` of its own",
        ),
        ({"checkpoint": {"keep_every": 700}}, r"keep_every: found 700, .* give a multiple of that, such as 1000"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, settings(**changes), where="")


def test_a_branch_in_a_folder_of_its_own_is_accepted() -> None:
    for branch_from in ("runs/a@step-00000012", "s3://bucket/a@step-00000012", "runs/a"):
        assert validate(RunConfig, settings(branch_from=branch_from), where="").branch_from == branch_from
