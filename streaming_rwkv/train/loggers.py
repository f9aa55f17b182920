"""Loggers of a run: metrics.jsonl, console, TensorBoard and trackers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.loggers import LoggerDestination, TensorboardLogger
from composer.loggers.progress_bar_logger import ProgressBarLogger

from streaming_rwkv.train.callbacks.console import Console
from streaming_rwkv.train.callbacks.json_lines import JSONLines
from streaming_rwkv.train.config import LogConfig, RunConfig
from streaming_rwkv.train.trackers import build_trackers, flat_settings


@dataclass(frozen=True, kw_only=True)
class RunLoggers:
    """Composer's loggers of a run, and the settings that are sent to its trackers."""

    all: list[LoggerDestination]
    lines: JSONLines
    console: Console
    trackers: list[LoggerDestination]
    settings: dict[str, Any]  # with interpolations in place of values from the environment

    def log_settings(self) -> None:
        """Send the run's settings to the trackers, once the trainer has started them."""
        for tracker in self.trackers:
            tracker.log_hyperparameters(self.settings)


def shows_progress_bar(log: LogConfig) -> bool:
    """Return True if a run draws a progress bar: it moves the cursor, so only on a terminal."""
    return log.progress_bar and sys.stderr.isatty()


def omit_settings(loggers: Sequence[LoggerDestination]) -> None:
    """Have Composer's progress bar leave out its list of settings, which are its own environment's."""
    for logger in loggers:
        if isinstance(logger, ProgressBarLogger):
            logger.hparams_already_logged_to_console = True


def build_loggers(config: RunConfig, *, last_step: int) -> RunLoggers:
    """Return the loggers that a run's configuration asks for."""
    log, save_folder = config.log, Path(config.save_folder)
    settings = flat_settings(config.with_interpolations(config.model_dump(mode="json", exclude_none=True)))
    lines = JSONLines(save_folder / "metrics.jsonl")
    console = Console(interval_steps=log.interval_steps, last_step=last_step, has_lines=not shows_progress_bar(log))
    loggers: list[LoggerDestination] = [lines, console]
    if log.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(save_folder / "tensorboard")))
    trackers = build_trackers(log, save_folder=save_folder)
    return RunLoggers(all=[*loggers, *trackers], lines=lines, console=console, trackers=trackers, settings=settings)
