"""Loss and tokens by stream during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from streaming_rwkv.distributed import all_reduce_sum
from streaming_rwkv.shards import StreamRecord
from streaming_rwkv.train.composer_model import add_by_stream


class Consumption(Callback):
    """Loss by stream, and the shares of tokens that were consumed."""

    def __init__(self, streams: Sequence[StreamRecord], *, interval_steps: int, last_step: int) -> None:
        self.names = [f"{stream.source}/{stream.bucket}" for stream in streams]
        self.interval_steps, self.last_step = interval_steps, last_step
        # Of all ranks, before this start of the run.
        self.before = torch.zeros(len(streams), dtype=torch.float64)
        self.window_before = torch.zeros(len(streams), 2, dtype=torch.float64)
        self.sums: dict[str, torch.Tensor] = {}  # of this rank, since this start

    def load(self, consumed: dict[str, float], not_logged: dict[str, tuple[float, float]]) -> None:
        """Continue counting after a checkpoint's `consumed` and `not_logged`."""
        self.before = torch.tensor([consumed.get(name, 0.0) for name in self.names], dtype=torch.float64)
        sums = [not_logged.get(name, (0.0, 0.0)) for name in self.names]
        self.window_before = torch.tensor(sums, dtype=torch.float64)

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
        """Return the targets of each stream that the whole run has trained on. Collective."""
        total = self.before + all_reduce_sum(self.sums["targets"].clone()).cpu()
        return dict(zip(self.names, total.tolist(), strict=True))

    def not_logged(self) -> dict[str, tuple[float, float]]:
        """Return the sum of losses and the targets of each stream since they were last logged. Collective."""
        window = torch.stack([self.sums["window_nll"], self.sums["window_targets"]], 1)
        total = self.window_before + all_reduce_sum(window).cpu()
        return {
            name: (nll, targets) for name, (nll, targets) in zip(self.names, total.tolist(), strict=True) if targets
        }

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval_steps and step != self.last_step:
            return
        consumed = self.consumed()
        total = sum(consumed.values())
        metrics = {f"share/{name}": value / total for name, value in consumed.items() if value}
        metrics |= {f"loss/stream/{name}": nll / targets for name, (nll, targets) in self.not_logged().items()}
        for window in (self.window_before, self.sums["window_nll"], self.sums["window_targets"]):
            window.zero_()
        logger.log_metrics(metrics)
