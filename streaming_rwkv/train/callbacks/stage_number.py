"""Curriculum stage of each step."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Callback, State
from composer.loggers import Logger


class StageNumber(Callback):
    """Log the curriculum stage of each step, counted from 0."""

    def __init__(self, stage_of: Callable[[int], int]) -> None:
        self.stage_of = stage_of

    def batch_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"stage": self.stage_of(int(state.timestamp.batch))})
