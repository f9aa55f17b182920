"""AdamW with the reference trainer's parameter groups and learning-rate schedule.

Source: RWKV-LM/RWKV-v7/train_temp, `configure_optimizers` and `train_callback`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from streaming_rwkv.config import ConfigError
from streaming_rwkv.train.config import OptimizerConfig


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the reference trainer's three parameter groups, in the order of `named_parameters`, each with a `name`.

    `att.w0`, the decay's offset, has twice the rate. Weight decay applies to two-dimensional `.weight`s: projections,
    embedding, head. LoRAs, norms and all vectors have none. Every parameter is in exactly one group.
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
    """Return AdamW over `parameter_groups`; multiply each group's rate by `lr_multiplier` at every step."""
    groups = parameter_groups(model, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_multiplier(config: OptimizerConfig, *, tokens_seen: int, total_tokens: int) -> float:
    """Return the learning rate of the step after `tokens_seen` tokens, as a share of `config.lr`.

    Both arguments and the configuration must count the same tokens. Beyond `total_tokens` the rate stays at its final
    value.

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
    """Return the position of `now` between `start` and `stop`, from 0 to 1."""
    return min(1.0, max(0.0, (now - start) / max(1, stop - start)))
