"""Saves a checkpoint again and again, each time killed one file operation later; started by test_checkpoint.py:

python save_worker.py BASE OUT STEP KEEP

Copies the folder BASE to OUT/000, OUT/001, … and saves step STEP into each: before its first file operation, its
second and so on the saving process gets SIGKILL. The last copy is the one whose save came to its end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.train.checkpoints.local import save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}  # and `open` below the folder


def kill_at(number: int, folder: Path) -> None:
    """Have this process killed just before file operation `number`, the first being 0."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS or (event == "open" and str(arguments[0]).startswith(str(folder))):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def main(base: Path, out: Path, step: int, keep: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=step)
    optimizer = build_optimizer(network, OptimizerConfig())
    progress = Progress(step=step, tokens=0, samples=0, slots=0, seconds=0, consumed={})
    # Once before the kills, so that what is imported or compiled on first use is not among the operations.
    save_checkpoint(out / "warm-up", model=network, optimizer=optimizer, progress=progress, run={}, keep=0)
    shutil.rmtree(out / "warm-up")
    for number in range(1000):
        folder = out / f"{number:03}"
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            kill_at(number, folder)
            save_checkpoint(folder, model=network, optimizer=optimizer, progress=progress, run={}, keep=keep)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit("never came to an end")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
