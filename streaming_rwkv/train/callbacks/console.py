"""Progress lines on the console."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination

from streaming_rwkv.distributed import is_rank_zero


class Console(LoggerDestination):
    """Print a line at every interval and evaluation."""

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
