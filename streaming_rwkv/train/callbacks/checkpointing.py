"""Checkpoints: at their interval, at the end of training, and when the run is asked to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from streaming_rwkv.distributed import all_reduce_sum, is_rank_zero
from streaming_rwkv.processes import listen_to_stop_signals
from streaming_rwkv.train.callbacks.clipping import ClipGradient
from streaming_rwkv.train.callbacks.consumption import Consumption
from streaming_rwkv.train.checkpoints.local import save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.composer_model import RWKV7ForTraining

STDERR = 2
STOPPING = b"stopping: finishing this step and writing a checkpoint; press Ctrl-C again to stop at once\n"


class Checkpointer(Callback):
    """Save checkpoints at their interval, after the last step, and when the run is asked to stop."""

    def __init__(
        self,
        root: Path,
        *,
        interval_steps: int,
        keep: int,
        keep_every: int | None = None,
        last_step: int,
        run: dict[str, Any],
        slots_before: Callable[[int], int],
        consumption: Consumption,
        clipping: ClipGradient,
        mirror: Mirror | None = None,
    ) -> None:
        self.root = root
        self.interval_steps = interval_steps
        self.keep = keep
        self.keep_every = keep_every
        self.last_step = last_step
        self.run = run
        self.slots_before = slots_before
        self.consumption = consumption
        self.clipping = clipping
        self.mirror = mirror
        self.asked_to_stop = False
        self.stopping = False

    def listen(self) -> None:
        """Handle SIGTERM, SIGHUP and the first Ctrl-C as requests to stop at the end of the step."""
        interrupted, announces = False, is_rank_zero()

        def ask_to_stop(number: int) -> None:
            nonlocal interrupted
            # SIGTERMs are not counted: one Ctrl-C causes a SIGINT from the terminal and a SIGTERM from the launcher, in
            # either order.
            if number == signal.SIGINT and interrupted:
                raise KeyboardInterrupt
            interrupted = interrupted or number == signal.SIGINT
            if announces and not self.asked_to_stop:
                with contextlib.suppress(OSError):
                    os.write(STDERR, STOPPING)  # `print` may be what the signal interrupts, and cannot be re-entered
            self.asked_to_stop = True

        listen_to_stop_signals(ask_to_stop)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        mirror = self.mirror
        # One rank may receive the signal a step before another: they must agree, or they would wait for each other.
        flags = [self.asked_to_stop, *((mirror.busy, mirror.failed) if mirror else (False, False))]
        device = next(state.model.parameters()).device
        asked, busy, failed = all_reduce_sum(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()
        if mirror and not busy and not failed:
            mirror.advance()
        self.stopping = bool(asked or failed)
        if not (self.stopping or step % self.interval_steps == 0 or step == self.last_step):
            return
        # At most one upload is in flight, so a slow network cannot build a queue. When stopping, save locally first,
        # since seconds may be left, and do not delete the checkpoint that is being uploaded.
        if mirror and not failed and not self.stopping:
            failed = not mirror.settle()
        assert isinstance(state.model, RWKV7ForTraining)
        progress = Progress(
            step=step,
            tokens=int(state.timestamp.token),
            samples=int(state.timestamp.sample),
            slots=self.slots_before(step),
            seconds=state.timestamp.total_wct.total_seconds(),
            steps_skipped=self.clipping.skipped,
            gradient_norms=self.clipping.gradient_norms,
            consumed=self.consumption.consumed(),
            # A mark has no NaN: the sum of a stream whose loss is one begins anew.
            not_logged={name: sums for name, sums in self.consumption.not_logged().items() if math.isfinite(sums[0])},
        )
        path = save_checkpoint(
            self.root,
            model=state.model.network,
            optimizer=state.optimizers[0],
            progress=progress,
            run=self.run,
            keep=0 if mirror and self.stopping else self.keep,
            keep_every=self.keep_every,
        )
        if mirror and not failed and self.stopping:
            failed = not mirror.settle()
        if mirror and failed:
            raise mirror.error()
        if mirror:
            mirror.begin(path)
        if self.stopping and step < self.last_step:
            state.stop_training()
