"""AdamW as the reference trainer groups and schedules it; the schedule is a pure function of tokens seen.

Source: RWKV-LM/RWKV-v7/train_temp, `configure_optimizers` and `train_callback`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from streaming_rwkv.config import Config, ConfigError


class OptimizerConfig(Config):
    """AdamW, gradient clipping and the learning rate's course."""

    lr: PositiveFloat = 6e-4
    """After warm-up."""
    lr_final: NonNegativeFloat = 6e-5
    """At the end."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: PositiveFloat = 1e-18
    weight_decay: NonNegativeFloat = 0.001
    """AdamW's, as `betas` and `eps`. The reference has 0.001 (MiniPile) to 0.1 (Pile)."""
    gradient_clip: PositiveFloat = 1.0
    """Largest norm of all gradients together."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which the rate rises from 1 % to `lr`, in a straight line."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine` falls from the end of the warm-up to the end of training; `wsd` (warm-up, stable, decay) stays at `lr`
    and falls in a straight line over the last `decay_tokens`."""
    decay_tokens: PositiveInt | None = Field(default=None)
    """For `wsd` alone."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final: found {self.lr_final}, above lr {self.lr}; the rate falls, it does not rise")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {list(self.betas)}, expected two numbers from 0 to below 1")
        if self.schedule == "wsd" and self.decay_tokens is None:
            raise ValueError("decay_tokens: schedule wsd needs it; a tenth to a fifth of all tokens is usual")
        if self.schedule != "wsd" and self.decay_tokens is not None:
            raise ValueError(f"decay_tokens: schedule {self.schedule} does not use it; leave it out, or choose wsd")
        return self


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The reference's three groups, in the order of `named_parameters`, with a `name` each.

    `att.w0`, the decay's offset, learns at twice the rate. Weight decay is for two-dimensional `.weight`s: projections,
    embedding, head. LoRAs, norms, and all vectors have none. Every parameter is in exactly one group.
    """
    groups: dict[str, dict[str, Any]] = {
        "no decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "double rate": {"params": [], "lr": 2 * lr, "weight_decay": 0.0},
        "decay": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    for name, parameter in model.named_parameters():
        if name.endswith("att.w0"):
            group = "double rate"
        elif name.endswith(".weight") and parameter.ndim >= 2:
            group = "decay"
        else:
            group = "no decay"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; multiply each group's rate by `lr_multiplier` at every step."""
    groups = parameter_groups(model, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_multiplier(config: OptimizerConfig, *, tokens_seen: int, total_tokens: int) -> float:
    """The learning rate of the step that follows `tokens_seen` tokens, as a share of `config.lr`.

    Tokens are targets, or anything else that grows in proportion, as long as both arguments and the configuration
    count the same. Past `total_tokens` the rate stays at its end.

    Raises:
        ConfigError: warm-up and decay do not fit into `total_tokens`.
    """
    if config.warmup_tokens + (config.decay_tokens or 0) > total_tokens:
        raise ConfigError(
            f"optimizer: warmup_tokens {config.warmup_tokens} and decay_tokens {config.decay_tokens or 0} together "
            f"exceed the {total_tokens} tokens of the whole run; lower them, or train on more tokens"
        )
    final = config.lr_final / config.lr
    match config.schedule:
        case "cosine":
            progress = _progress(tokens_seen, config.warmup_tokens, total_tokens)
            multiplier = (1 + final) / 2 + (1 - final) / 2 * math.cos(math.pi * progress)
        case "wsd":
            assert config.decay_tokens is not None
            progress = _progress(tokens_seen, total_tokens - config.decay_tokens, total_tokens)
            multiplier = 1 + (final - 1) * progress
    if tokens_seen < config.warmup_tokens:
        multiplier *= 0.01 + 0.99 * tokens_seen / config.warmup_tokens
    return multiplier


def _progress(now: int, start: int, stop: int) -> float:
    """How far `now` is on the way from `start` to `stop`, 0 … 1."""
    return min(1.0, max(0.0, (now - start) / max(1, stop - start)))
