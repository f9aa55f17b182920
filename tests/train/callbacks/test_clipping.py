"""Gradients are clipped, and steps with gradients that are not finite are stopped at or skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from composer.core import State
from composer.loggers import Logger

from streaming_rwkv.train.callbacks.clipping import ClipGradient, TrainingStopped
from tests.train.callbacks.run_state import state_at


def with_gradient(value: float) -> tuple[State, Logger, dict[str, Any], list[torch.Tensor]]:
    """Every gradient 0, but two entries of the head's: `value` and 4."""
    state, logger, metrics = state_at(step=6)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradient = dict(state.model.named_parameters())["network.head.weight"].grad
    assert gradient is not None
    gradient[0, 0], gradient[1, 1] = value, 4.0
    return state, logger, metrics, [parameter.detach().clone() for parameter in state.model.parameters()]


def head_gradient(state: State) -> list[float]:
    gradient = dict(state.model.named_parameters())["network.head.weight"].grad
    assert gradient is not None
    return gradient[[0, 1], [0, 1]].tolist()


@pytest.mark.parametrize(("largest", "expected"), [(1.0, [0.6, 0.8]), (5.0, [3, 4]), (100.0, [3, 4])])
def test_a_gradient_is_clipped_to_the_largest_norm(largest: float, expected: list[float]) -> None:
    state, logger, metrics, _ = with_gradient(3.0)
    ClipGradient(largest, on_nonfinite="stop").after_train_batch(state, logger)
    assert metrics == {"optimizer/gradient_norm": 5.0}  # 3, 4, 5: as it was before
    assert head_gradient(state) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(value: float) -> None:
    state, logger, _, before = with_gradient(value)
    with pytest.raises(TrainingStopped, match=r"step 7: the gradient is not finite .*; in .*none\).*on_nonfinite=skip"):
        ClipGradient(1.0, on_nonfinite="stop").after_train_batch(state, logger)
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), before, strict=True))


def test_weights_that_are_not_finite_are_named() -> None:
    state, logger, _, _ = with_gradient(math.nan)
    dict(state.model.named_parameters())["network.emb.weight"].data[0, 0] = math.nan
    with pytest.raises(TrainingStopped, match=r"not finite themselves: network\.emb\.weight\)"):
        ClipGradient(1.0, on_nonfinite="stop").after_train_batch(state, logger)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_weights_and_moments_alone(value: float) -> None:
    state, logger, metrics, before = with_gradient(value)
    clip = ClipGradient(1.0, on_nonfinite="skip")
    clip.after_train_batch(state, logger)
    state.optimizers[0].step()
    assert metrics["optimizer/steps_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), before, strict=True))
    assert not state.optimizers[0].state
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip.after_train_batch(state, logger)
    state.optimizers[0].step()  # the next step is taken again
    assert not any(torch.equal(a, b) for a, b in zip(state.model.parameters(), before, strict=True))
