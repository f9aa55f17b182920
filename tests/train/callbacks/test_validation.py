"""Validation losses are reported by source, bucket and stream, at the steps of evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from composer.core import Event, Timestamp

from streaming_rwkv.train.callbacks.validation import ValidationReport, evaluation_interval
from streaming_rwkv.train.composer_model import LossByStream
from tests.train.callbacks.run_state import STREAMS, batch_of, state_at


def test_validation_is_reported_over_all_and_by_source_bucket_and_stream() -> None:
    state, logger, metrics = state_at()
    metric = LossByStream(3)
    # targets 4, 2, 10; bytes twice as many; the last pack is blank
    metric.update(torch.tensor([8.0, 6.0, 5.0, 0.0]), batch_of([4, 2, 10, 1], [0, 1, 2, -1]))
    assert metric.compute().item() == 19 / 16
    state.eval_metrics = {"eval": {"loss": metric}}
    ValidationReport(STREAMS).eval_end(state, logger)
    losses = {name: value for name, value in metrics.items() if name.startswith("validation/loss/")}
    assert losses == {
        "validation/loss/all": 19 / 16,
        "validation/loss/source/web": 14 / 6,
        "validation/loss/source/code": 5 / 10,
        "validation/loss/bucket/1-16": 13 / 14,
        "validation/loss/bucket/17-32": 6 / 2,
        "validation/loss/stream/web/1-16": 8 / 4,
        "validation/loss/stream/web/17-32": 6 / 2,
        "validation/loss/stream/code/1-16": 5 / 10,
    }
    assert metrics["validation/perplexity/source/code"] == pytest.approx(math.exp(0.5))
    # 19 nats over 32 bytes
    assert metrics["validation/bits_per_byte/all"] == pytest.approx(19 / 0.6931471805599453 / 32)
    assert len(metrics) == 3 * 8


def test_a_stream_without_validation_packs_is_left_out() -> None:
    state, logger, metrics = state_at()
    metric = LossByStream(3)
    metric.update(torch.tensor([8.0]), batch_of([4], [0]))
    metric.compute()
    state.eval_metrics = {"eval": {"loss": metric}}
    ValidationReport(STREAMS).eval_end(state, logger)
    assert {name for name in metrics if "loss" in name} == {
        f"validation/loss/{name}" for name in ("all", "source/web", "bucket/1-16", "stream/web/1-16")
    }


def test_evaluations_come_before_the_checkpoint_of_their_step_and_at_the_end():
    due = evaluation_interval(4, last_step=10)
    state, _, _ = state_at()
    asked = []
    for step in range(1, 11):
        state.timestamp = Timestamp(batch=step)
        # Composer asks at each of these in turn, and writes checkpoints between the first two.
        asked += [(step, event) for event in (Event.BATCH_END, Event.EPOCH_END, Event.FIT_END) if due(state, event)]
    assert asked == [(4, Event.BATCH_END), (8, Event.BATCH_END), (10, Event.BATCH_END)]
