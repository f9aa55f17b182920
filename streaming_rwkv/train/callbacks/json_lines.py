"""Metrics as one JSON line per step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination

from streaming_rwkv.distributed import is_rank_zero
from streaming_rwkv.filesystem import append_to, read_regular_file, write_atomically
from streaming_rwkv.train.checkpoints.record import LARGEST_LOG_BYTES


class JSONLines(LoggerDestination):
    """Write every metric of every step to one file, one JSON line per step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: dict[str, float] = {}
        self.step = -1
        self.writes = is_rank_zero()

    def rewind(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed run writes again."""
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
            line = json.dumps(_finite_only({"step": step, **self.pending}), allow_nan=False) + "\n"
            with append_to(self.path) as file:
                file.write(line.encode())
        self.pending = {}


def _finite_only(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite_only(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite_only(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def forget_lines_after(path: Path, step: int) -> None:
    """Remove the lines after `step`, and incomplete lines that a killed run left, in one atomic write.

    Raises:
        UserError: a link, another file that is not regular, or one that is too large.
    """
    try:
        content = read_regular_file(path, most=LARGEST_LOG_BYTES, follow=False)
    except FileNotFoundError:
        return
    # As bytes: after a loss of power some may not be UTF-8, and complete lines stay unchanged.
    kept = [line for line in content.split(b"\n") if _step_of(line) <= step]
    write_atomically(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # incomplete: the run was killed while it wrote the line
