"""Traces of chosen steps, and snapshots of GPU memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.profiler import ProfilerActivity, profile

from streaming_rwkv.distributed import rank
from streaming_rwkv.train.config import ProfileConfig

MOST_MEMORY_EVENTS = 100_000


class Profile(Callback):
    """Write a trace of some steps for each rank: `profile/steps-20-23/rank-0.json.gz`.

    It opens in chrome://tracing and in Perfetto. With `memory`, sizes of tensors are recorded too, and on CUDA the
    allocator's history, in `rank-0.pickle` for pytorch.org/memory_viz. Weights are not changed.
    """

    def __init__(self, save_folder: Path, config: ProfileConfig) -> None:
        self.first, self.last = config.steps
        self.memory = config.memory
        self.folder = save_folder / "profile" / f"steps-{self.first}-{self.last}"
        self.running: Any = None

    @property
    def _snapshots(self) -> bool:
        return self.memory and torch.cuda.is_available()

    def batch_start(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch) + 1
        if self.running is not None or not self.first <= step <= self.last:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if self._snapshots:
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        self.running = profile(activities=activities, profile_memory=self.memory, record_shapes=True)
        self.running.start()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.running is not None and int(state.timestamp.batch) >= self.last:
            self._finish()

    def close(self, state: State, logger: Logger) -> None:
        if self.running is not None:  # the run ends within the steps
            self._finish()

    def _finish(self) -> None:
        running, self.running = self.running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.folder / f"rank-{rank()}.json.gz"))
        if self._snapshots:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{rank()}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
