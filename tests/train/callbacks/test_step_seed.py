"""Random numbers are a function of the seed and the step."""

from __future__ import annotations

import torch

from streaming_rwkv.train.callbacks.step_seed import StepSeed
from tests.train.callbacks.run_state import state_at


def draw(seed: int, step: int) -> float:
    state, logger, _ = state_at(step=step)
    StepSeed(seed).batch_start(state, logger)
    return torch.rand(()).item()


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone() -> None:
    first = {(seed, step): draw(seed, step) for seed in (0, 1) for step in (0, 1, 2)}
    torch.rand(1000)
    again = {(seed, step): draw(seed, step) for step in (2, 1, 0) for seed in (1, 0)}
    assert first == again
    assert len(set(first.values())) == 6
