"""What happens around a step: learning rate, clipping, checkpoints, and what is reported.

Each of these is a function of the step, or carries its state through the checkpoint's mark, so that a resumed run
does just what the unbroken one would have done.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination
from torch.distributed.tensor import DTensor

from streaming_rwkv.config import UserError
from streaming_rwkv.distributed import all_reduce_sum, is_rank_zero, rank
from streaming_rwkv.filesystem import write_atomically
from streaming_rwkv.shards import StreamRecord
from streaming_rwkv.train.checkpoints.local import save_checkpoint
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.composer_model import LossByStream, RWKV7ForTraining, add_by_stream
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import lr_multiplier

logger = logging.getLogger(__name__)


class TrainingStopped(UserError):
    """The run cannot go on; the text says why and what to do."""


class StepSeed(Callback):
    """Randomness of a step is a function of seed, step and rank: nothing to save, and nothing to forget to restore."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        entropy = np.random.SeedSequence([self.seed, int(state.timestamp.batch), rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


class LearningRate(Callback):
    """The schedule, by tokens: each group's own rate times the course of the whole."""

    def __init__(self, config: OptimizerConfig, *, total_tokens: int) -> None:
        self.config = config
        self.total_tokens = total_tokens
        self.base: list[float] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self.base = [group["lr"] for group in state.optimizers[0].param_groups]

    def batch_start(self, state: State, logger: Logger) -> None:
        multiplier = lr_multiplier(self.config, tokens_seen=int(state.timestamp.token), total_tokens=self.total_tokens)
        for group, base in zip(state.optimizers[0].param_groups, self.base, strict=True):
            group["lr"] = base * multiplier
        logger.log_metrics({"optimizer/lr": self.config.lr * multiplier})


class StageNumber(Callback):
    """Which stage of the curriculum a step belongs to, counted from 0."""

    def __init__(self, stage_of: Callable[[int], int]) -> None:
        self.stage_of = stage_of

    def batch_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"stage": self.stage_of(int(state.timestamp.batch))})


class ClipGradient(Callback):
    """Clip to the largest norm, report it, and catch a gradient that is not finite before it reaches the weights."""

    def __init__(self, largest_norm: float, *, on_nonfinite: str) -> None:
        self.largest_norm = largest_norm
        self.on_nonfinite = on_nonfinite
        self.skipped = 0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.largest_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        logger.log_metrics({"optimizer/gradient_norm": value})
        if math.isfinite(value):
            return
        step = int(state.timestamp.batch) + 1
        bad = [name for name, p in state.model.named_parameters() if p.grad is not None and not _finite(p)]
        if self.on_nonfinite == "stop":
            raise TrainingStopped(
                f"step {step}: the gradient is not finite (norm {value}; in weights that are not finite themselves: "
                f"{', '.join(bad[:3]) or 'none'}). Lower optimizer.lr, or say on_nonfinite=skip to leave such steps out"
            )
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None  # AdamW leaves weights and moments without a gradient alone
        logger.log_metrics({"optimizer/steps_skipped": self.skipped})


def _finite(parameter: torch.Tensor) -> bool:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(local).all())


class Consumption(Callback):
    """Loss and tokens by stream as they are trained on; the shares that were really consumed."""

    def __init__(self, streams: Sequence[StreamRecord], *, interval_steps: int) -> None:
        self.names = [f"{stream.source}/{stream.bucket}" for stream in streams]
        self.interval_steps = interval_steps
        self.before = torch.zeros(len(streams), dtype=torch.float64)  # of all ranks, until this start of the run
        self.sums: dict[str, torch.Tensor] = {}  # of this rank, since

    def load(self, consumed: dict[str, float]) -> None:
        self.before = torch.tensor([consumed.get(name, 0.0) for name in self.names], dtype=torch.float64)

    def fit_start(self, state: State, logger: Logger) -> None:
        device = next(state.model.parameters()).device
        zeros = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.sums = {name: zeros.clone() for name in ("targets", "window_targets", "window_nll")}

    def after_loss(self, state: State, logger: Logger) -> None:
        batch, outputs = state.batch, state.outputs
        assert isinstance(outputs, dict)
        targets = batch["pack_starts"].diff()
        add_by_stream(self.sums["targets"], targets, batch["streams"])
        add_by_stream(self.sums["window_targets"], targets, batch["streams"])
        add_by_stream(self.sums["window_nll"], outputs["pack_nll"], batch["streams"])

    def consumed(self) -> dict[str, float]:
        """Targets of each stream that the whole run has trained on; called by all ranks together."""
        total = self.before + all_reduce_sum(self.sums["targets"].clone()).cpu()
        return dict(zip(self.names, total.tolist(), strict=True))

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.interval_steps:
            return
        consumed = self.consumed()
        total = sum(consumed.values())
        metrics = {f"share/{name}": value / total for name, value in consumed.items() if value}
        window = torch.stack([self.sums["window_nll"], self.sums["window_targets"]])
        nll, targets = all_reduce_sum(window).cpu().tolist()
        metrics |= {f"loss/stream/{n}": a / b for n, a, b in zip(self.names, nll, targets, strict=True) if b}
        self.sums["window_nll"].zero_()
        self.sums["window_targets"].zero_()
        logger.log_metrics(metrics)


def groups_of(streams: Sequence[StreamRecord]) -> dict[str, list[int]]:
    """What is reported together: indices of streams by all, source, bucket and stream."""
    groups: dict[str, list[int]] = {"all": list(range(len(streams)))}
    for i, stream in enumerate(streams):
        for name in (
            f"source/{stream.source}",
            f"bucket/{stream.bucket}",
            f"stream/{stream.source}/{stream.bucket}",
        ):
            groups.setdefault(name, []).append(i)
    return groups


def validation_metrics(groups: Mapping[str, Sequence[int]], totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Loss, perplexity and bits per byte of each group.

    Args:
        totals: `LossByStream.totals`.
    """
    metrics = {}
    for group, members in groups.items():
        nll, targets, text_bytes = (sum(totals[name][i] for i in members) for name in ("nll", "targets", "text_bytes"))
        if targets:
            metrics[f"validation/loss/{group}"] = nll / targets
            metrics[f"validation/perplexity/{group}"] = math.exp(min(700.0, nll / targets))
        if text_bytes:
            # Comparable between tokenizers, as the loss per token is not.
            metrics[f"validation/bits_per_byte/{group}"] = nll / math.log(2) / text_bytes
    return metrics


class ValidationReport(Callback):
    """Loss, perplexity and bits per byte on validation, over all and by source, bucket and stream."""

    def __init__(self, streams: Sequence[StreamRecord]) -> None:
        self.groups = groups_of(streams)

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics["eval"]["loss"]
        assert isinstance(metric, LossByStream)
        logger.log_metrics(validation_metrics(self.groups, metric.totals))


class Throughput(Callback):
    """Tokens a second, share of time spent waiting for data, tokens and time left."""

    def __init__(
        self, *, total_tokens: int, flops_per_token: int, peak_flops: float | None, interval_steps: int
    ) -> None:
        self.total_tokens = total_tokens
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.interval_steps = interval_steps
        self.window_start = self.waited = self.asked_for_data = 0.0
        self.window_tokens = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._open_window(state)

    def _open_window(self, state: State) -> None:
        self.window_start, self.window_tokens, self.waited = time.perf_counter(), int(state.timestamp.token), 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked_for_data = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited += time.perf_counter() - self.asked_for_data

    def eval_end(self, state: State, logger: Logger) -> None:
        self._open_window(state)  # the time of an evaluation is not the training's

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.interval_steps:
            return
        seconds = time.perf_counter() - self.window_start
        rate = (int(state.timestamp.token) - self.window_tokens) / max(seconds, 1e-9)
        if not rate:
            return
        left = max(0, self.total_tokens - int(state.timestamp.token))
        metrics = {
            "throughput/tokens_per_second": rate,
            "throughput/waiting_for_data": self.waited / seconds,
            "throughput/tokens_left": left,
            "throughput/seconds_left": left / rate,
        }
        if self.peak_flops:
            metrics["throughput/mfu"] = rate * self.flops_per_token / self.peak_flops
        logger.log_metrics(metrics)
        self._open_window(state)


class Checkpointer(Callback):
    """Checkpoints at their interval, at the end, and when the run is asked to stop (SIGTERM, Ctrl-C)."""

    def __init__(
        self,
        root: Path,
        *,
        interval_steps: int,
        keep: int,
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
        self.last_step = last_step
        self.run = run
        self.slots_before = slots_before
        self.consumption = consumption
        self.clipping = clipping
        self.mirror = mirror
        self.asked_to_stop = False
        self.stopping = False

    def listen(self) -> None:
        """Take SIGTERM, and the first Ctrl-C, as a wish to stop at the end of the step."""
        interrupted = False

        def on_signal(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            # Not whoever was asked before: of one Ctrl-C comes a SIGINT from the terminal and a SIGTERM from the
            # launcher, in either order.
            if number == signal.SIGINT and interrupted:
                raise KeyboardInterrupt
            interrupted = interrupted or number == signal.SIGINT
            self.asked_to_stop = True

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        mirror = self.mirror
        # One rank may hear the signal a step before another: they must agree, or they would wait for each other.
        flags = [self.asked_to_stop, *((mirror.busy, mirror.failed) if mirror else (False, False))]
        device = next(state.model.parameters()).device
        asked, busy, failed = all_reduce_sum(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()
        if mirror and not busy and not failed:
            mirror.advance()
        self.stopping = bool(asked or failed)
        if not (self.stopping or step % self.interval_steps == 0 or step == self.last_step):
            return
        # One checkpoint at a time goes up: no queue grows before a slow network. Who has been asked to stop may have
        # seconds left, though: this one goes onto the disk first, where nothing that is on its way up is removed.
        if mirror and not failed and not self.stopping:
            failed = not mirror.settle()
        assert isinstance(state.model, RWKV7ForTraining)
        mark = {
            "tokens": int(state.timestamp.token),
            "samples": int(state.timestamp.sample),
            "slots": self.slots_before(step),
            "seconds": state.timestamp.total_wct.total_seconds(),
            "steps_skipped": self.clipping.skipped,
            "consumed": self.consumption.consumed(),
            "run": self.run,
        }
        path = save_checkpoint(
            self.root,
            step=step,
            model=state.model.network,
            optimizer=state.optimizers[0],
            mark=mark,
            keep=0 if mirror and self.stopping else self.keep,
        )
        if mirror and not failed and self.stopping:
            failed = not mirror.settle()
        if mirror and failed:
            raise mirror.error()
        if mirror:
            mirror.begin(path)
        if self.stopping and step < self.last_step:
            state.stop_training()


def evaluation_interval(interval_steps: int, *, last_step: int) -> Callable[[State, Event], bool]:
    """Evaluate every so many steps and at the end; before the step's checkpoint, so that a kill can lose neither."""

    def due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        return event == Event.BATCH_END and (step % interval_steps == 0 or step == last_step)

    return due


class JSONLines(LoggerDestination):
    """Every metric of every step in one file, a line each: nothing to install, nothing to parse twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: dict[str, float] = {}
        self.step = -1
        self.writes = is_rank_zero()

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`: a resumed run writes them again."""
        if self.writes:
            forget_lines_after(self.path, step)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                value = value.item() if value.numel() == 1 else value.tolist()
            self.pending[name] = value

    def batch_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def eval_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def flush(self, step: int) -> None:
        if self.writes and self.pending:
            with open(self.path, "a") as file:
                file.write(json.dumps(_finite_only({"step": step, **self.pending}), allow_nan=False) + "\n")
        self.pending = {}


def _finite_only(value: Any) -> Any:
    """Plain values with None for numbers that JSON does not have: a loss that is not finite."""
    if isinstance(value, dict):
        return {key: _finite_only(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite_only(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def forget_lines_after(path: Path, step: int) -> None:
    """Keep the lines of JSON up to `step`, in one move; a line that a kill tore goes too."""
    if not path.exists():
        return
    # Bytes: after a loss of power there may be some that are no UTF-8, and lines that are whole stay as they are.
    kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
    write_atomically(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # torn by a kill


class Console(LoggerDestination):
    """A line for every interval and evaluation, for people and for log files."""

    def __init__(self, *, interval_steps: int, last_step: int) -> None:
        self.interval_steps = interval_steps
        self.last_step = last_step
        self.latest: dict[str, Any] = {}
        self.writes = is_rank_zero()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.latest |= metrics

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step == 1 or step % self.interval_steps == 0 or step == self.last_step:
            get = self.latest.get
            self._print(
                f"step {step}/{self.last_step}  loss {_number(get('loss/train/total'))}"
                f"  lr {get('optimizer/lr', 0):.2e}  norm {_number(get('optimizer/gradient_norm'))}"
                f"  {_number(get('throughput/tokens_per_second'), 0)} tokens/s"
                f"  left {_duration(get('throughput/seconds_left'))}"
            )

    def eval_end(self, state: State, logger: Logger) -> None:
        get = self.latest.get
        self._print(
            f"step {int(state.timestamp.batch)}/{self.last_step}  validation loss "
            f"{_number(get('validation/loss/all'))}  bits per byte {_number(get('validation/bits_per_byte/all'))}"
        )

    def _print(self, line: str) -> None:
        if self.writes:
            print(line, flush=True)


def _number(value: Any, digits: int = 4) -> str:
    return "–" if value is None else f"{float(value):,.{digits}f}"


def _duration(seconds: Any) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
