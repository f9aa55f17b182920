"""Activation checkpointing: a module keeps its inputs alone, and is computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Forward = TypeVar("Forward", bound=Callable[..., Any])


def recomputed(forward: Forward) -> Forward:
    """Decorate the `forward` of a module, to compute it again in the backward pass.

    It applies where the module's `activation_checkpointing` is True and gradients are enabled. Inputs are positional;
    there must be no randomness in `forward`.
    """

    @functools.wraps(forward)
    def wrapper(module: Any, *inputs: Any) -> Any:
        if module.activation_checkpointing and torch.is_grad_enabled():
            # There is no randomness, so none is saved for the second pass.
            return checkpoint(forward, module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return forward(module, *inputs)

    return wrapper  # type: ignore[return-value]
