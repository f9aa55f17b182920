"""A run's state around a step, with Composer's own State and Logger, for the tests of callbacks."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger, LoggerDestination

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.shards import ShardRecord, StreamRecord
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer


class Collected(LoggerDestination):
    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.metrics |= metrics


def state_at(*, step: int = 0, tokens: int = 0) -> tuple[State, Logger, dict[str, Any]]:
    """A run's state before step `step`, a logger, and what was logged to it."""
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    model = RWKV7ForTraining(network, num_streams=3, flops_per_token=1)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1.0, lr_final=0.2))
    state = State(
        model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba", optimizers=optimizer
    )
    state.timestamp = Timestamp(batch=step, token=tokens)
    collected = Collected()
    return state, Logger(state, destinations=[collected]), collected.metrics


def stream(source: str, lower: int, upper: int) -> StreamRecord:
    return StreamRecord(
        split="train", source=source, lower=lower, upper=upper, documents=1, pieces=1, targets=1, bytes=1, packs=1,
        index_sha256="",
        shards=[ShardRecord(basename="shard.00000.mds.zstd", bytes=1, sha256="", raw_bytes=1, raw_sha256="", packs=1)],
    )  # fmt: skip


STREAMS = [stream("web", 1, 16), stream("web", 17, 32), stream("code", 1, 16)]


def batch_of(targets: list[int], streams: list[int]) -> dict[str, Any]:
    starts = torch.tensor([0, *targets]).cumsum(0).int()
    return {"pack_starts": starts, "streams": torch.tensor(streams), "text_bytes": torch.tensor(targets) * 2}
