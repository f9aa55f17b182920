"""One of two ranks, each on a machine with a disk of its own; started by test_uploader.py:

python mirror_worker.py RANK PORT FOLDER REMOTE

Saves step 7 into FOLDER and REMOTE; then rank 1 loses its disk, twice, and both resume from what is left. Without
REMOTE they stop with an error.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.weights import CheckpointError
from streaming_rwkv.processes import end_with
from streaming_rwkv.storage import open_store
from streaming_rwkv.train.checkpoints.local import find_problem, load_checkpoint, newest_checkpoint, save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.checkpoints.restore import node_checkpoint, restore
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer


def new_model(*, seed: int) -> tuple[RWKV7, torch.optim.Optimizer]:
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=seed)
    return network, build_optimizer(network, OptimizerConfig())


def main(rank: int, port: int, folder: Path, remote: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = "0"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    store = open_store(remote, timeout_seconds=30)
    folder.mkdir()
    assert restore(store, folder) == (None, False)
    network, optimizer = new_model(seed=7)
    progress = Progress(step=7, tokens=0, samples=0, slots=0, seconds=0, consumed={})
    path = save_checkpoint(
        folder / "checkpoints", model=network, optimizer=optimizer, progress=progress, run={}, keep=2
    )
    written = sorted(path.iterdir())
    mirror = Mirror(store, folder, keep=2)
    mirror.begin(path)
    mirror.finish()
    if rank == 1:
        shutil.rmtree(folder)
    checkpoint, in_store = restore(store, folder)
    assert checkpoint is not None
    assert (checkpoint.step, in_store) == (7, True)
    assert newest_checkpoint(folder / "checkpoints") == checkpoint  # whole on this disk
    if rank == 1:
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=rf"not complete on every node \({socket.gethostname()}: "):
        restore(None, folder)
    assert restore(store, folder) == (checkpoint, True)  # though rank 0 has it whole
    assert newest_checkpoint(folder / "checkpoints") == checkpoint
    assert restore(None, folder) == (checkpoint, False)
    assert find_problem(node_checkpoint(remote, folder / "init_from")) is None  # for another run to start from
    again, optimizer = new_model(seed=1)
    load_checkpoint(checkpoint, model=again, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    print(json.dumps([path.name for path in written]))
    store.close()


if __name__ == "__main__":
    end_with(lambda: main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
