"""Gradients are clipped, and steps with gradients that are not finite are stopped at or skipped."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from composer.core import State
from composer.loggers import Logger

from streaming_rwkv.train.callbacks.clipping import ClipGradient, TrainingStopped
from streaming_rwkv.train.config import SpikeConfig
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


def spiking(reaction: Literal["skip", "stop"]) -> ClipGradient:
    """After norms of 0.5, so that the 5 of `with_gradient` is ten times their median."""
    clip = ClipGradient(1.0, on_nonfinite="stop", on_spike=SpikeConfig(norm_over=8, window=4, reaction=reaction))
    clip.load(skipped=2, norms=[0.5, 0.5, 0.5])
    return clip


def test_a_spike_is_skipped_and_counted() -> None:
    state, logger, metrics, before = with_gradient(3.0)
    clip = spiking("skip")
    clip.after_train_batch(state, logger)
    state.optimizers[0].step()
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), before, strict=True))
    assert (clip.skipped, clip.gradient_norms) == (3, [0.5, 0.5, 0.5, 5.0])
    assert metrics["optimizer/steps_skipped"] == 3


def test_a_spike_stops_the_run_with_the_step_to_leave_out() -> None:
    state, logger, _, _ = with_gradient(3.0)
    with pytest.raises(TrainingStopped) as stopped:
        spiking("stop").after_train_batch(state, logger)
    assert str(stopped.value) == (
        "step 7: the gradient's norm is 5, 10.0 times the running median 0.5, and on_spike.norm_over is 8. Resume from "
        "the last checkpoint with data.skip_steps=[[7,7]] to leave the step out, or raise on_spike.norm_over"
    )


@pytest.mark.parametrize("value", [3.0, math.nan])
@pytest.mark.parametrize(("skip_steps", "left_out"), [([(5, 7)], True), ([(7, 7)], True), ([(1, 6), (8, 9)], False)])
def test_steps_are_left_out_by_their_number(value: float, skip_steps: list[tuple[int, int]], left_out: bool) -> None:
    state, logger, _, _ = with_gradient(value)  # of step 7
    clip = ClipGradient(1.0, on_nonfinite="skip", skip_steps=skip_steps)
    clip.after_train_batch(state, logger)
    assert clip.skipped == int(left_out or math.isnan(value))
    gradients = [parameter.grad for parameter in state.model.parameters()]
    assert all(gradient is None for gradient in gradients) == bool(clip.skipped)
