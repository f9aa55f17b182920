"""Gradient clipping, and steps that are left out: by request, with a gradient that is not finite, or with a spike."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

from streaming_rwkv.config import UserError
from streaming_rwkv.distributed import is_rank_zero
from streaming_rwkv.train.callbacks.spikes import SpikeDetector
from streaming_rwkv.train.config import SpikeConfig

log = logging.getLogger(__name__)


class TrainingStopped(UserError):
    """An error that stops training; its text names the cause and the remedy."""


class ClipGradient(Callback):
    """Clip the gradient to the largest norm, log the norm, and stop the run at or skip steps that would do harm.

    A skipped step leaves weights and moments as they are; everything else counts it: its packs, tokens and number.
    """

    def __init__(
        self,
        largest_norm: float,
        *,
        on_nonfinite: str,
        on_spike: SpikeConfig | None = None,
        skip_steps: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.largest_norm = largest_norm
        self.on_nonfinite = on_nonfinite
        self.on_spike = on_spike
        self.skip_steps = list(skip_steps)
        self.spikes = SpikeDetector(on_spike.norm_over, window=on_spike.window) if on_spike else None
        self.skipped = 0

    def load(self, *, skipped: int, norms: Sequence[float]) -> None:
        """Continue counting after a checkpoint."""
        self.skipped = skipped
        if self.spikes:
            self.spikes.load(norms)

    @property
    def gradient_norms(self) -> list[float] | None:
        """Return the norms of the last steps, which `load` continues from; None without `on_spike`."""
        return list(self.spikes.norms) if self.spikes else None

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.largest_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        logger.log_metrics({"optimizer/gradient_norm": value})
        step = int(state.timestamp.batch) + 1
        if not self._is_left_out(state, step, value):
            return
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None  # AdamW does not change weights and moments without a gradient
        logger.log_metrics({"optimizer/steps_skipped": self.skipped})

    def _is_left_out(self, state: State, step: int, norm: float) -> bool:
        """Return True for a step to skip.

        Raises:
            TrainingStopped: the step has a gradient at which the run is to stop.
        """
        if any(first <= step <= last for first, last in self.skip_steps):
            return True
        if not math.isfinite(norm):
            self._check_nonfinite(state, step, norm)
            return True
        median = self.spikes.spike(norm) if self.spikes else None
        if median is None:
            return False
        assert self.on_spike is not None
        text = f"the gradient's norm is {norm:.4g}, {norm / median:.1f} times the running median {median:.4g}"
        if self.on_spike.reaction == "stop":
            raise TrainingStopped(
                f"step {step}: {text}, and on_spike.norm_over is {self.on_spike.norm_over:g}. Resume from the last "
                f"checkpoint with data.skip_steps=[[{step},{step}]] to leave the step out, or raise on_spike.norm_over"
            )
        if is_rank_zero():
            log.warning("step %d: %s; skipped", step, text)
        return True

    def _check_nonfinite(self, state: State, step: int, value: float) -> None:
        if self.on_nonfinite == "skip":
            return
        bad = [name for name, p in state.model.named_parameters() if p.grad is not None and not _finite(p)]
        raise TrainingStopped(
            f"step {step}: the gradient is not finite (norm {value}; in weights that are not finite themselves: "
            f"{', '.join(bad[:3]) or 'none'}). Lower optimizer.lr, or set on_nonfinite=skip to skip such steps"
        )


def _finite(parameter: torch.Tensor) -> bool:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(local).all())
