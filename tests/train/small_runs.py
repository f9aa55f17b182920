"""Runs of 15 steps, with a checkpoint after 5, 10 and 15, and comparisons of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streaming_rwkv.model.weights import read_state
from streaming_rwkv.train.checkpoints.record import read_mark
from tests.fork_server import ForkServer
from tools.ports import free_ports

ROOT = Path(__file__).parents[2]
TRAIN = {("web", 1, 16): 24, ("web", 17, 32): 20, ("code", 1, 16): 16}
VALIDATION = {("web", 1, 16): 4}
STEPS = 15  # one pass over 60 packs, 4 to a step
SETTINGS = [
    "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.stages.0.passes=1", "data.workers=0",
    "checkpoint.interval_steps=5", "checkpoint.keep=1", "checkpoint.keep_every=5", "log.tensorboard=false",
]  # fmt: skip


class SmallRuns:
    """Start runs on one data set, and wait for them."""

    def __init__(self, data: Path, programs: ForkServer) -> None:
        self.data = data
        self.programs = programs

    def __call__(
        self, save_folder: Path, *overrides: str, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Return a run's exit status and output."""
        command = [
            Path(sys.executable).with_name("composer"), "-n", str(processes), "--master_port", str(free_ports(1)[0]),
            "train.py", "yamls/tiny_cpu.yaml", f"data.path={self.data}", f"save_folder={save_folder}",
            *SETTINGS, *overrides,
        ]  # fmt: skip
        save_folder.mkdir(parents=True, exist_ok=True)
        log = save_folder / "output"
        environment = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as output:
            program = self.programs.popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            status = program.wait(timeout=800)
        return status, log.read_text()


def copy_until(run: Path, step: int, to: Path) -> Path:
    """Copy a run as it was after the checkpoint of `step`; a resumed run writes later lines of the log again."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if path.name > f"step-{step:08}":
            shutil.rmtree(path)
    return to


def losses(run: Path) -> list[tuple[int, float]]:
    """Return the training loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/train/total"]) for line in lines if "loss/train/total" in line]


def mark_of(run: Path, step: int = STEPS) -> dict[str, Any]:
    return read_mark(run / "checkpoints" / f"step-{step:08}").model_dump()


def assert_same_end(run: Path, other: Path) -> None:
    """Compare the last checkpoints of two runs, bit for bit."""
    last = f"checkpoints/step-{STEPS:08}"
    weights, expected = read_state(run / last), read_state(other / last)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    keys = ("tokens", "samples", "slots", "consumed", "run", "steps_skipped")
    assert [mark_of(run)[key] for key in keys] == [mark_of(other)[key] for key in keys]
