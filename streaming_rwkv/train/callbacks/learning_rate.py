"""Learning-rate schedule, applied before each step."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import lr_multiplier


class LearningRate(Callback):
    """Set each parameter group's rate to its own rate times the schedule's multiplier at the tokens seen."""

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
