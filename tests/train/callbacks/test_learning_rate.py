"""Each parameter group follows the learning rate's schedule."""

from __future__ import annotations

import pytest

from streaming_rwkv.train.callbacks.learning_rate import LearningRate
from streaming_rwkv.train.config import OptimizerConfig
from tests.train.callbacks.run_state import state_at


def test_each_group_follows_the_schedule_from_its_own_rate() -> None:
    state, logger, metrics = state_at(step=3, tokens=500)
    schedule = LearningRate(OptimizerConfig(lr=1.0, lr_final=0.2), total_tokens=1000)
    schedule.fit_start(state, logger)
    schedule.batch_start(state, logger)
    # halfway of a cosine from 1 to 0.2; w0 learns at double rate
    assert [group["lr"] for group in state.optimizers[0].param_groups] == pytest.approx([0.6, 1.2, 0.6])
    assert metrics["optimizer/lr"] == pytest.approx(0.6)
    schedule.batch_start(state, logger)  # not twice
    assert state.optimizers[0].param_groups[1]["lr"] == pytest.approx(1.2)
