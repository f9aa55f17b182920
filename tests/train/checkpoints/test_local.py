"""Checkpoints are complete or absent, the newest complete one is used, and changed files are refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.weights import CheckpointError, read_state
from streaming_rwkv.shards import sha256_of_file
from streaming_rwkv.train.checkpoints.local import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer
from tests.fork_server import ForkServer

RUN = {"data": "8d1f", "batch_packs": 16, "order": {"seed": 17}}


def new_model(*, seed: int, layers: int = 1) -> tuple[RWKV7, torch.optim.Optimizer]:
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=layers))
    initialize(network, seed=seed)
    return network, build_optimizer(network, OptimizerConfig(lr=1e-3))


def trained(*, seed: int, steps: int = 2, layers: int = 1) -> tuple[RWKV7, torch.optim.Optimizer]:
    """A model after some steps on noise, so that every moment is a number of its own."""
    network, optimizer = new_model(seed=seed, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return network, optimizer


def progress(step: int) -> Progress:
    return Progress(step=step, tokens=100 * step, samples=step, seconds=0, consumed={})


def save(
    root: Path,
    step: int,
    *,
    keep: int = 0,
    keep_every: int | None = None,
    seed: int | None = None,
    layers: int = 1,
) -> Path:
    network, optimizer = trained(seed=step if seed is None else seed, layers=layers)
    return save_checkpoint(
        root,
        model=network,
        optimizer=optimizer,
        progress=progress(step),
        run=RUN,
        keep=keep,
        keep_every=keep_every,
    )


def steps_below(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def data_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_weights_and_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    network, optimizer = trained(seed=1, layers=2)
    path = save_checkpoint(tmp_path, model=network, optimizer=optimizer, progress=progress(7), run=RUN, keep=0)
    again, optimizer_again = new_model(seed=2, layers=2)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step) == (path, 7)
    load_checkpoint(checkpoint, model=again, optimizer=optimizer_again)
    for (name, saved), loaded in zip(network.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(saved, loaded), name
        before, after = optimizer.state[saved], optimizer_again.state[loaded]
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_steps_after_a_resume_are_those_of_the_unbroken_run(tmp_path: Path) -> None:
    unbroken, _ = trained(seed=3, steps=5)
    first, optimizer = trained(seed=3, steps=2)
    save_checkpoint(tmp_path, model=first, optimizer=optimizer, progress=progress(2), run=RUN, keep=0)
    network, optimizer = new_model(seed=9)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_checkpoint(checkpoint, model=network, optimizer=optimizer)
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in network.parameters()]
        if step >= 2:
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), network.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    network, optimizer = new_model(seed=1)
    save_checkpoint(tmp_path, model=network, optimizer=optimizer, progress=progress(0), run=RUN, keep=0)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    again, optimizer = trained(seed=2)
    load_checkpoint(checkpoint, model=again, optimizer=optimizer)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


def test_weights_can_be_read_without_the_training(tmp_path: Path) -> None:
    network, optimizer = trained(seed=1)
    path = save_checkpoint(tmp_path, model=network, optimizer=optimizer, progress=progress(1), run=RUN, keep=0)
    state = read_state(path)
    assert all(torch.equal(state[name], parameter) for name, parameter in network.named_parameters())


def test_saving_is_quiet(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save(tmp_path, 1)
    assert [str(warning.message) for warning in recwarn] == []


def test_without_checkpoints_a_run_starts_afresh(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "not there") is None


def test_the_newest_is_chosen_by_its_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.mark.tokens) == (100, 10_000)


def test_an_interrupted_write_is_passed_over_and_cleaned_up_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    save(tmp_path, 3)
    assert steps_below(tmp_path) == ["step-00000001", "step-00000003"]


def test_only_an_interrupted_first_write_is_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / ".step-00000001.tmp")
    assert newest_checkpoint(tmp_path) is None


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("truncated", lambda path: truncate(data_file(path)), r"__0_0\.distcp has \d+ bytes instead of \d+"),
    ("missing", lambda path: data_file(path).unlink(), r"__0_0\.distcp is missing"),
    ("index missing", lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    ("unmarked", lambda path: (path / "complete.json").unlink(), r"no completion mark \(complete\.json\)"),
    ("torn mark", lambda path: truncate(path / "complete.json"), r"complete\.json: not valid JSON"),
    ("foreign", lambda path: (path / "complete.json").write_text("{}"), r"not of the format 'streaming-rwkv-ch"),
]


@pytest.mark.parametrize(("damage", "named"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(
    damage: Callable[[Path], object], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert "going back to" in caplog.text
    assert "step-00000002: " in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=rf"no checkpoint here is whole \(step-00000002: .*{named}.*restore one"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_changed_content_is_named_when_it_is_read(name: str, tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, 1) / name)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    network, optimizer = new_model(seed=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"step-00000001/{name}: its content is not what was written; move"):
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_shape_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1, layers=2)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    network, optimizer = new_model(seed=1)
    with pytest.raises(CheckpointError, match=r"model\.blocks\.1\.\S+ is \(.*\) in the checkpoint and missing in this"):
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)


def test_the_last_n_on_disk_are_kept(tmp_path: Path) -> None:
    for step in (1, 2):  # by an earlier start of the run
        save(tmp_path, step, keep=3)
    save(tmp_path, 3, keep=3)
    assert steps_below(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    save(tmp_path, 4, keep=3)
    assert steps_below(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=1)
    assert steps_below(tmp_path) == ["step-00000005"]
    save(tmp_path, 6, keep=0)
    assert steps_below(tmp_path) == ["step-00000005", "step-00000006"]


def test_checkpoints_of_every_nth_step_stay_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step, keep=2, keep_every=4)
    assert steps_below(tmp_path) == ["step-00000004", "step-00000008", "step-00000010"]
    save(tmp_path, 12, keep=1)  # without it, they are as the others
    assert steps_below(tmp_path) == ["step-00000012"]


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """A run that went back before the damage must not lose what it writes now."""
    save(tmp_path, 1)
    truncate(data_file(save(tmp_path, 5)))
    save(tmp_path, 2, keep=1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert steps_below(tmp_path) == ["step-00000002", "step-00000005"]


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(data_file(save(tmp_path, 2)))
    save(tmp_path, 2)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert steps_below(tmp_path) == ["step-00000001", "step-00000002"]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_an_index_with_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    path = save(tmp_path / "root", 1)
    ran = tmp_path / "ran"
    (path / ".metadata").write_bytes(pickle.dumps(Payload(ran)))
    mark = json.loads((path / "complete.json").read_bytes())  # who can change the index can change the mark
    mark["files"][".metadata"] = {
        "bytes": (path / ".metadata").stat().st_size,
        "sha256": sha256_of_file(path / ".metadata"),
    }
    (path / "complete.json").write_text(json.dumps(mark))
    checkpoint = newest_checkpoint(tmp_path / "root")
    assert checkpoint is not None
    network, optimizer = new_model(seed=1)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused"):
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)
    assert not ran.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert ran.exists()  # and so it would have run


def test_an_index_with_a_pickled_tensor_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path / "root", 1)
    ran = tmp_path / "ran"
    torch.save(Payload(ran), path / "__1_0.distcp")
    index = pickle.loads((path / ".metadata").read_bytes())
    key = "optimizer.emb.weight.exp_avg"
    index.state_dict_metadata[key] = BytesStorageMetadata()
    where = next(entry for entry in index.storage_data if entry.fqn == key)
    size = (path / "__1_0.distcp").stat().st_size
    index.storage_data = {entry: stored for entry, stored in index.storage_data.items() if entry != where}
    index.storage_data[MetadataIndex(key)] = _StorageInfo(relative_path="__1_0.distcp", offset=0, length=size)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    mark = json.loads((path / "complete.json").read_bytes())
    for name in (".metadata", "__1_0.distcp"):
        mark["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of_file(path / name)}
    (path / "complete.json").write_text(json.dumps(mark))
    checkpoint = newest_checkpoint(tmp_path / "root")
    assert checkpoint is not None
    network, optimizer = new_model(seed=1)
    with pytest.raises(
        CheckpointError, match=r"optimizer\.emb\.weight\.exp_avg is missing in the checkpoint and \(20, 64\)"
    ):
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)
    assert not ran.exists()
    torch.load(path / "__1_0.distcp", weights_only=False)
    assert ran.exists()  # and so torch would have run it


def before_a_kill(base: Path, situation: str) -> None:
    save(base, 1)
    save(base, 2)
    match situation:
        case "after an interrupted write":
            shutil.copytree(base / "step-00000002", base / ".step-00000003.tmp")
        case "over a damaged one":
            truncate(data_file(save(base, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("situation", "keep"), [("plain", 0), ("after an interrupted write", 1), ("over a damaged one", 2)]
)
def test_a_kill_between_any_two_file_operations_leaves_the_last_or_the_new_checkpoint(
    situation: str, keep: int, tmp_path: Path, programs: ForkServer
) -> None:
    before_a_kill(tmp_path / "base", situation)
    out = tmp_path / "out"
    out.mkdir()
    worker = Path(__file__).with_name("save_worker.py")
    programs.run([sys.executable, worker, tmp_path / "base", out, "3", str(keep)], check=True, timeout=600)
    folders = sorted(out.iterdir())
    assert len(folders) > 10  # one for each moment of a kill, and the last without one
    chosen = []
    for folder in folders:
        checkpoint = newest_checkpoint(folder)
        assert checkpoint is not None
        chosen.append(checkpoint.step)
        network, optimizer = new_model(seed=1)
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)
        save(folder, checkpoint.step + 1, keep=keep)
        kept = [f"step-{step:08}" for step in range(1, checkpoint.step + 2)]
        assert steps_below(folder) == kept[-keep:]
    assert chosen == sorted(chosen)
    assert set(chosen) == {2, 3}
