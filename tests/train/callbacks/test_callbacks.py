"""What happens around a step, with Composer's own State and Logger; the sums are done by hand."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger, LoggerDestination

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.shards import ShardRecord, StreamRecord
from streaming_rwkv.train.callbacks.checkpointing import Checkpointer
from streaming_rwkv.train.callbacks.clipping import ClipGradient, TrainingStopped
from streaming_rwkv.train.callbacks.consumption import Consumption
from streaming_rwkv.train.callbacks.json_lines import JSONLines
from streaming_rwkv.train.callbacks.learning_rate import LearningRate
from streaming_rwkv.train.callbacks.stage_number import StageNumber
from streaming_rwkv.train.callbacks.step_seed import StepSeed
from streaming_rwkv.train.callbacks.validation import ValidationReport, evaluation_interval
from streaming_rwkv.train.composer_model import LossByStream, RWKV7ForTraining, add_by_stream
from streaming_rwkv.train.config import OptimizerConfig, SpikeConfig
from streaming_rwkv.train.optimizer import build_optimizer


class Collected(LoggerDestination):
    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.metrics |= metrics


def state_at(*, step: int = 0, tokens: int = 0) -> tuple[State, Logger, dict[str, Any]]:
    """A run's state before step `step`, a logger, and what was logged to it."""
    network = RWKV7(RWKV7Config(vocab_size=20, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    model = RWKV7ForTraining(network, num_streams=3, flops_per_token=1)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1.0, lr_final=0.2))
    state = State(
        model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba", optimizers=optimizer
    )
    state.timestamp = Timestamp(batch=step, token=tokens)
    collected = Collected()
    return state, Logger(state, destinations=[collected]), collected.metrics


def stream(source: str, lower: int, upper: int) -> StreamRecord:
    return StreamRecord(
        split="train", source=source, lower=lower, upper=upper, documents=1, pieces=1, targets=1, bytes=1, packs=1,
        index_sha256="",
        shards=[ShardRecord(basename="shard.00000.mds.zstd", bytes=1, sha256="", raw_bytes=1, raw_sha256="", packs=1)],
    )  # fmt: skip


STREAMS = [stream("web", 1, 16), stream("web", 17, 32), stream("code", 1, 16)]


def batch_of(targets: list[int], streams: list[int]) -> dict[str, Any]:
    starts = torch.tensor([0, *targets]).cumsum(0).int()
    return {"pack_starts": starts, "streams": torch.tensor(streams), "text_bytes": torch.tensor(targets) * 2}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewind_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JSONLines(path)
    for step in (1, 2, 3, 4):
        lines.log_metrics({"loss": step / 2})
        lines.flush(step)
    lines.log_metrics({"validation": 9.0})
    lines.flush(2)
    lines.rewind(2)
    assert lines_of(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 2, "validation": 9.0}]
    lines.rewind(0)
    assert lines_of(path) == []


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}garbage', "{}", "17", "\0\0\0"])
def test_rewind_drops_a_line_that_a_kill_tore(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n' + torn)
    lines = JSONLines(path)
    lines.rewind(2)
    lines.log_metrics({"loss": 1.0})
    lines.flush(2)
    assert lines_of(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_rewind_without_a_file_is_nothing(tmp_path: Path) -> None:
    JSONLines(tmp_path / "metrics.jsonl").rewind(5)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_as_numbers(tmp_path: Path) -> None:
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.log_metrics({"a": torch.tensor(0.5), "b": torch.tensor([1, 2])})
    lines.flush(1)
    lines.flush(2)  # nothing since
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": [1, 2]}]


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


def test_the_stage_of_each_step_is_logged() -> None:
    stages = []
    for step in range(5):
        state, logger, metrics = state_at(step=step)
        StageNumber(lambda step: int(step >= 3)).batch_start(state, logger)
        stages.append(metrics["stage"])
    assert stages == [0, 0, 0, 1, 1]


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
    assert clip.progress() == {"steps_skipped": 3, "gradient_norms": [0.5, 0.5, 0.5, 5.0]}
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
    state.optimizers[0].step()  # and the next step goes on
    assert not any(torch.equal(a, b) for a, b in zip(state.model.parameters(), before, strict=True))


def test_sums_by_stream_leave_blank_packs_out() -> None:
    sums = torch.zeros(3, dtype=torch.float64)
    add_by_stream(sums, torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, -1, 2]))
    assert sums.tolist() == [2, 0, 9]
    add_by_stream(sums, torch.tensor([16.0, math.nan]), torch.tensor([1, -1]))
    assert sums.tolist() == [2, 16, 9]


def test_consumption_is_counted_in_targets_over_the_whole_run() -> None:
    state, logger, metrics = state_at(step=10)
    consumption = Consumption(STREAMS, interval_steps=5)
    consumption.load({"web/1-16": 60.0, "code/1-16": 10.0})
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
    consumption = Consumption(STREAMS, interval_steps=5)
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


@pytest.fixture
def signals_restored() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize("asked", [[signal.SIGINT], [signal.SIGINT, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
def test_one_ctrl_c_asks_to_stop_whatever_the_launcher_adds_and_a_second_one_stops(
    asked: list[signal.Signals], tmp_path: Path
) -> None:
    checkpointer = Checkpointer(
        tmp_path,
        interval_steps=1,
        keep=1,
        last_step=1,
        run={},
        slots_before=lambda step: step,
        consumption=Consumption(STREAMS, interval_steps=1),
        clipping=ClipGradient(1.0, on_nonfinite="skip"),
    )
    checkpointer.listen()
    assert not checkpointer.asked_to_stop
    for number in asked:
        os.kill(os.getpid(), number)
    assert checkpointer.asked_to_stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
