"""Training speed."""

from __future__ import annotations

import time

from composer.core import Callback, State
from composer.loggers import Logger


class Throughput(Callback):
    """Tokens per second, share of time spent waiting for data, and tokens and time left."""

    def __init__(
        self, *, total_tokens: int, flops_per_token: int, peak_flops: float | None, interval_steps: int, last_step: int
    ) -> None:
        self.total_tokens = total_tokens
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.interval_steps, self.last_step = interval_steps, last_step
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
        self._open_window(state)  # an evaluation's time does not count as training

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval_steps and step != self.last_step:
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
