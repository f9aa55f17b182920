"""Gradient clipping, and steps whose gradient is not finite."""

from __future__ import annotations

import math

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

from streaming_rwkv.config import UserError


class TrainingStopped(UserError):
    """An error that stops training; its text names the cause and the remedy."""


class ClipGradient(Callback):
    """Clip the gradient to the largest norm, log the norm, and stop or skip a step whose gradient is not finite."""

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
                f"{', '.join(bad[:3]) or 'none'}). Lower optimizer.lr, or set on_nonfinite=skip to skip such steps"
            )
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None  # AdamW does not change weights and moments without a gradient
        logger.log_metrics({"optimizer/steps_skipped": self.skipped})


def _finite(parameter: torch.Tensor) -> bool:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(torch.isfinite(local).all())
