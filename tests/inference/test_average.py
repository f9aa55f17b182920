"""Averages of checkpoints, against sums in float64 over whole models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from streaming_rwkv.inference import command_line
from streaming_rwkv.inference.average import Scheme, average, newest_checkpoints, scheme_weights
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.train.checkpoints.local import save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer


def save(run: Path, step: int, *, layers: int = 1) -> Path:
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=layers))
    initialize(network, seed=step)
    optimizer = build_optimizer(network, OptimizerConfig())
    progress = Progress(step=step, tokens=step, samples=step, slots=step, seconds=0, consumed={})
    return save_checkpoint(run / "checkpoints", model=network, optimizer=optimizer, progress=progress, run={}, keep=0)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("average") / "run"
    for step in (1, 2, 3, 4):
        save(run, step)
    return run


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("equal", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ("1-sqrt", [0.5, 2**-0.5 - 0.5, 0.75**0.5 - 2**-0.5, 1 - 0.75**0.5]),
    ],
)
def test_the_weights_of_four_checkpoints(scheme: Scheme, expected: list[float]) -> None:
    assert scheme_weights(scheme, 4) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("scheme", ["equal", "linear", "1-sqrt"])
def test_an_average_is_that_of_float64_rounded_once(scheme: Scheme, a_run: Path) -> None:
    weights = scheme_weights(scheme, 3)
    with newest_checkpoints(str(a_run), 3) as folders:
        assert [folder.name for folder in folders] == ["step-00000002", "step-00000003", "step-00000004"]
        found = average(folders, weights)
    states = [read_state(folder) for folder in folders]
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        expected = sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True))
        assert torch.equal(value, expected.float()), name  # type: ignore[union-attr]


def test_the_average_of_one_checkpoint_is_that_checkpoint(a_run: Path, tmp_path: Path) -> None:
    assert command_line.average([str(a_run), str(tmp_path / "out.pth"), "--last", "1", "--dtype", "float32"]) == 0
    expected = read_state(a_run / "checkpoints" / "step-00000004")
    found = read_state(tmp_path / "out.pth")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_command_names_what_it_averaged(a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.average([str(a_run), "--last", "2", "--weights", "linear", str(tmp_path / "hf")]) == 0
    said, how = capsys.readouterr().out.splitlines()
    assert said.startswith(f"wrote {tmp_path / 'hf'}: ")
    assert said.endswith(", the average of 2 checkpoints, step-00000003, step-00000004")
    assert how.startswith("load it with: import fla; ")
    states = [read_state(a_run / "checkpoints" / f"step-{step:08}") for step in (3, 4)]
    expected = states[0]["emb.weight"].double() * (1 / 3) + states[1]["emb.weight"].double() * (2 / 3)
    assert torch.equal(read_state(tmp_path / "hf")["emb.weight"], expected.bfloat16())


def test_an_earlier_export_is_replaced_only_on_request(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(a_run), str(tmp_path / "out.pth"), "--last", "1"]
    (tmp_path / "out.pth").write_bytes(b"earlier")
    assert command_line.average(arguments) == 1
    expected = f"error: {tmp_path / 'out.pth'}: exists already; name another place, or replace it with --overwrite\n"
    assert capsys.readouterr().err.endswith(expected)
    assert (tmp_path / "out.pth").read_bytes() == b"earlier"
    assert command_line.average([*arguments, "--overwrite"]) == 0


def test_too_few_checkpoints_are_counted(a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.average([str(a_run), str(tmp_path / "out.pth")]) == 1
    assert "--last 8: the run has 4 checkpoints (step-00000001, " in capsys.readouterr().err
    assert command_line.average([str(tmp_path), str(tmp_path / "out.pth")]) == 1
    assert "not a run: it has no folder 'checkpoints'" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_left_out_silently(a_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(a_run, tmp_path / "run"))
    (run / "checkpoints" / "step-00000003" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="step-00000003 is damaged"), newest_checkpoints(str(run), 3):
        pass


def test_checkpoints_of_other_shapes_are_refused(a_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(a_run, tmp_path / "run"))
    save(run, 5, layers=2)
    with (
        newest_checkpoints(str(run), 2) as folders,
        pytest.raises(
            CheckpointError, match=r"step-00000005: blocks\.1\.\S+ is \(.*, in .*step-00000004 it is missing"
        ),
    ):
        average(folders, [0.5, 0.5])
