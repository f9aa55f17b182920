"""The stage of the curriculum is logged at each step."""

from __future__ import annotations

from streaming_rwkv.train.callbacks.stage_number import StageNumber
from tests.train.callbacks.run_state import state_at


def test_the_stage_of_each_step_is_logged() -> None:
    stages = []
    for step in range(5):
        state, logger, metrics = state_at(step=step)
        StageNumber(lambda step: int(step >= 3)).batch_start(state, logger)
        stages.append(metrics["stage"])
    assert stages == [0, 0, 0, 1, 1]
