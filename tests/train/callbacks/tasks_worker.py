"""Run by test_tasks.py on two ranks: sharded, they find exactly the scores that each finds alone.

python tasks_worker.py FOLDER TOKENIZER

FOLDER has tasks/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Precision
from composer.distributed.prepare_distributed import parallelize_composer_model
from torch.distributed.fsdp import FSDPModule

from streaming_rwkv.config import validate
from streaming_rwkv.processes import end_with
from streaming_rwkv.train.callbacks.tasks import TaskScores, load_tasks
from streaming_rwkv.train.composer_model import RWKV7ForTraining, build_mesh, sharding
from streaming_rwkv.train.config import EvaluationConfig
from tests.train.callbacks.small_tasks import import_harness, network, state_of

NAMES = ["choices", "words", "texts", "rows"]


def scores(config: EvaluationConfig, tokenizer: Path, *, sharded: bool, leads: bool) -> dict[str, Any]:
    model = RWKV7ForTraining(network(), num_streams=1, flops_per_token=1)
    if sharded:
        mesh = build_mesh(1, device="cpu", timeout_seconds=60)
        assert mesh is not None
        parallelize_composer_model(model, None, sharding(mesh), precision=Precision.FP32)
        assert isinstance(model.network.blocks[0], FSDPModule)
    state, logger, logged = state_of(model, step=500)
    callback = TaskScores(config, load_tasks(config) if leads else None, tokenizer_folder=tokenizer, last_step=500)
    callback.fit_start(state, logger)
    for _ in range(2):
        callback.eval_end(state, logger)
    return dict(logged)


def main() -> None:
    folder, tokenizer = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    config = validate(EvaluationConfig, {"tasks": NAMES, "task_folder": str(folder / "tasks")}, where="evaluation")
    # Before there is a process group each rank is the only one.
    import_harness(folder / f"datasets-{os.environ['RANK']}")
    alone = scores(config, tokenizer, sharded=False, leads=True)
    dist.init_process_group("gloo")
    together = scores(config, tokenizer, sharded=True, leads=dist.get_rank() == 0)
    assert together == alone, (together, alone)
    assert {f"tasks/{name}" for name in NAMES} == {name.rpartition("/")[0] for name in alone}
    print("equal", flush=True)


end_with(main)
