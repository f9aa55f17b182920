"""Targets and losses are counted by stream."""

from __future__ import annotations

import pytest
import torch
from composer.core import Timestamp

from streaming_rwkv.train.callbacks.consumption import Consumption
from tests.train.callbacks.run_state import STREAMS, batch_of, state_at


def test_consumption_is_counted_in_targets_over_the_whole_run() -> None:
    state, logger, metrics = state_at(step=10)
    consumption = Consumption(STREAMS, interval_steps=5, last_step=100)
    consumption.load({"web/1-16": 60.0, "code/1-16": 10.0}, {})
    consumption.fit_start(state, logger)
    for targets, streams, nll in (([10, 30], [0, 1], [5.0, 60.0]), ([10, 7], [0, -1], [15.0, 9.0])):
        state.batch, state.outputs = batch_of(targets, streams), {"pack_nll": torch.tensor(nll)}
        consumption.after_loss(state, logger)
    consumption.batch_end(state, logger)
    # 60 + 20, 30 and 10 of 120
    assert consumption.consumed() == {"web/1-16": 80, "web/17-32": 30, "code/1-16": 10}
    assert metrics == {
        "share/web/1-16": pytest.approx(80 / 120),
        "share/web/17-32": pytest.approx(30 / 120),
        "share/code/1-16": pytest.approx(10 / 120),
        "loss/stream/web/1-16": 20 / 20,
        "loss/stream/web/17-32": 60 / 30,
    }


def test_losses_by_stream_are_those_since_the_last_report() -> None:
    state, logger, metrics = state_at(step=5)
    consumption = Consumption(STREAMS, interval_steps=5, last_step=100)
    consumption.fit_start(state, logger)
    for nll in (30.0, 10.0):
        metrics.clear()
        state.batch, state.outputs = batch_of([10], [2]), {"pack_nll": torch.tensor([nll])}
        consumption.after_loss(state, logger)
        consumption.batch_end(state, logger)
        assert metrics["loss/stream/code/1-16"] == nll / 10
    state.timestamp = Timestamp(batch=6)
    metrics.clear()
    consumption.batch_end(state, logger)
    assert metrics == {}
    state.timestamp = Timestamp(batch=7)
    consumption.last_step = 7
    consumption.after_loss(state, logger)
    consumption.batch_end(state, logger)
    assert metrics["loss/stream/code/1-16"] == 1.0


def test_losses_since_the_last_report_survive_a_stop() -> None:
    state, logger, metrics = state_at(step=3)
    consumption = Consumption(STREAMS, interval_steps=5, last_step=100)
    consumption.fit_start(state, logger)
    state.batch, state.outputs = batch_of([10, 30], [2, 0]), {"pack_nll": torch.tensor([20.0, 30.0])}
    consumption.after_loss(state, logger)
    not_logged = consumption.not_logged()
    assert not_logged == {"web/1-16": (30, 30), "code/1-16": (20, 10)}

    state, logger, metrics = state_at(step=5)
    resumed = Consumption(STREAMS, interval_steps=5, last_step=100)
    resumed.load(consumption.consumed(), not_logged)
    resumed.fit_start(state, logger)
    state.batch, state.outputs = batch_of([10], [2]), {"pack_nll": torch.tensor([40.0])}
    resumed.after_loss(state, logger)
    resumed.batch_end(state, logger)
    assert {name: value for name, value in metrics.items() if name.startswith("loss/")} == {
        "loss/stream/web/1-16": 30 / 30,
        "loss/stream/code/1-16": (20 + 40) / (10 + 10),
    }
    assert resumed.not_logged() == {}
