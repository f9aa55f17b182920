"""Network and optimizer of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from streaming_rwkv.distributed import barrier, run_on_all
from streaming_rwkv.model.flops import flops_per_token
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.state import load_state
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.optimizer import build_optimizer
from streaming_rwkv.train.startup import CheckedRun, remove_initial_weights


def build_model(run: CheckedRun) -> tuple[RWKV7ForTraining, torch.optim.AdamW]:
    """Return the network, with initial weights unless a checkpoint follows, and its optimizer."""
    prepared, config = run.prepared, run.prepared.config
    network = RWKV7(prepared.model)
    if run.checkpoint is None and run.initial is not None:
        path = run.initial.path
        assert path is not None  # a run without a path has a checkpoint, which start-up has found
        run_on_all(lambda: load_state(network, read_state(path), where=str(config.model.init_from)))
        barrier()
        remove_initial_weights(Path(config.save_folder))
    elif run.checkpoint is None:
        initialize(network, seed=config.seed)
    validation_records = prepared.shard_set.manifest.select("validation")
    model = RWKV7ForTraining(
        network,
        num_streams=max(len(prepared.plan.streams), len(validation_records)),
        flops_per_token=flops_per_token(prepared.model),
    )
    return model, build_optimizer(network, config.optimizer)
