"""Progress lines on the console."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination

from streaming_rwkv.console import shown, shown_duration
from streaming_rwkv.distributed import is_rank_zero
from streaming_rwkv.version import PROGRAM


class Console(LoggerDestination):
    """Print a line at every interval and evaluation, and keep the values of the summary."""

    def __init__(self, *, interval_steps: int, last_step: int, has_lines: bool = True) -> None:
        """Configure the lines.

        Args:
            has_lines: print them; False if a progress bar is shown instead.
        """
        self.interval_steps = interval_steps
        self.last_step = last_step
        self.latest: dict[str, Any] = {}
        self.losses: list[float] = []  # of the steps since the last line
        self.writes = is_rank_zero()
        self.has_lines = has_lines

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.latest |= metrics

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        get = self.latest.get
        if (loss := get("loss/train/total")) is not None:
            self.losses.append(float(loss))
        if step == 1 or step % self.interval_steps == 0 or step == self.last_step:
            left = 0 if step == self.last_step else get("throughput/seconds_left")
            mfu = get("throughput/mfu")  # of a device whose peak is known
            self._print(
                f"step {step}/{self.last_step}  loss {_number(mean_finite(self.losses))}"
                f"  lr {get('optimizer/lr', 0):.2e}  norm {_number(get('optimizer/gradient_norm'), 2)}"
                f"  {int(state.timestamp.token):,} tokens  {_number(get('throughput/tokens_per_second'), 0)} tokens/s"
                f"{'' if mfu is None else f'  MFU {float(mfu):.1%}'}"
                f"  elapsed {_elapsed(state)}  left {'–' if left is None else shown_duration(float(left))}"
            )
            self.losses = []

    def eval_end(self, state: State, logger: Logger) -> None:
        get = self.latest.get
        self._print(
            f"step {int(state.timestamp.batch)}/{self.last_step}  validation loss "
            f"{_number(get('validation/loss/all'))}  bits per byte {_number(get('validation/bits_per_byte/all'))}"
        )

    def print_summary(self, state: State, *, save_folder: str) -> None:
        """Print the result of a run that is finished, and the next command."""
        validation = self.latest.get("validation/loss/all")
        result = "" if validation is None else f"validation loss {_number(validation)}; "
        if self.writes:
            folder = shown(save_folder)
            print(
                f"finished: {int(state.timestamp.batch):,} steps, {int(state.timestamp.token):,} tokens in "
                f"{_elapsed(state)}; {result}{folder}\n"
                f'next: {PROGRAM} generate {folder} "Once upon a time"',
                flush=True,
            )

    def _print(self, line: str) -> None:
        if self.writes and self.has_lines:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}", flush=True)


def mean_finite(values: list[float]) -> float | None:
    """Return the mean of the values that are finite, or None if there is none: a skipped step may have no loss."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _elapsed(state: State) -> str:
    """Return the time in training, that before the last resume included."""
    return shown_duration((state.timestamp.total_wct or timedelta()).total_seconds())


def _number(value: Any, digits: int = 4) -> str:
    return "–" if value is None else f"{float(value):,.{digits}f}"
