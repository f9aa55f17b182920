"""Lines of a run on the console, and the summary of a finished one."""

from __future__ import annotations

import math
import re
from datetime import timedelta

import pytest
from composer.core import State, Timestamp

from streaming_rwkv.train.callbacks.console import Console, mean_finite
from tests.train.callbacks.run_state import state_at

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def run_steps(console: Console, losses: list[float], **metrics: float) -> State:
    """Train a run of 100 tokens and 2 seconds a step."""
    state, logger, _ = state_at()
    for step, loss in enumerate(losses, 1):
        state.timestamp = Timestamp(batch=step, token=100 * step, total_wct=timedelta(seconds=2 * step))
        console.log_metrics({"loss/train/total": loss, **metrics}, step=step)
        console.batch_end(state, logger)
    return state


def test_a_line_has_the_mean_loss_of_the_steps_since_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(interval_steps=3, last_step=6)
    metrics = {"optimizer/lr": 1e-3, "optimizer/gradient_norm": 1.234, "throughput/tokens_per_second": 1234.5}
    run_steps(console, [9.0, 4.0, 2.0, 5.0, math.nan, 1.0], **metrics, **{"throughput/seconds_left": 3661.9})
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(DATE, line) for line in lines)
    assert [re.sub(DATE, "", line) for line in lines] == [
        "step 1/6  loss 9.0000  lr 1.00e-03  norm 1.23  100 tokens  1,234 tokens/s  elapsed 0:00:02  left 1:01:01",
        "step 3/6  loss 3.0000  lr 1.00e-03  norm 1.23  300 tokens  1,234 tokens/s  elapsed 0:00:06  left 1:01:01",
        "step 6/6  loss 3.0000  lr 1.00e-03  norm 1.23  600 tokens  1,234 tokens/s  elapsed 0:00:12  left 0:00:00",
    ]


def test_a_line_has_the_share_of_a_known_device_s_peak(capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(
        Console(interval_steps=10, last_step=9),
        [2.0],
        **{"throughput/tokens_per_second": 1234.5, "throughput/mfu": 0.3456},
    )
    assert "  1,234 tokens/s  MFU 34.6%  elapsed " in capsys.readouterr().out


def test_what_is_not_known_yet_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(Console(interval_steps=10, last_step=9), [math.nan])
    assert re.sub(DATE, "", capsys.readouterr().out) == (
        "step 1/9  loss –  lr 0.00e+00  norm –  100 tokens  – tokens/s  elapsed 0:00:02  left –\n"
    )


def test_an_evaluation_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(interval_steps=10, last_step=9)
    state, logger, _ = state_at(step=5)
    console.log_metrics({"validation/loss/all": 2.0, "validation/bits_per_byte/all": 0.75})
    console.eval_end(state, logger)
    assert re.sub(DATE, "", capsys.readouterr().out) == "step 5/9  validation loss 2.0000  bits per byte 0.7500\n"


@pytest.mark.parametrize(("metrics", "result"), [({}, ""), ({"validation/loss/all": 2.5}, "validation loss 2.5000; ")])
def test_a_finished_run_says_what_comes_next(
    metrics: dict[str, float], result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(interval_steps=10, last_step=20)
    state = run_steps(console, [1.0] * 20, **metrics)
    capsys.readouterr()
    console.print_summary(state, save_folder="runs/mine")
    assert capsys.readouterr().out == (
        f"finished: 20 steps, 2,000 tokens in 0:00:40; {result}runs/mine\n"
        'next: streaming-rwkv generate runs/mine "Once upon a time"\n'
    )


def test_beside_a_progress_bar_the_summary_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(interval_steps=1, last_step=2, has_lines=False)
    state = run_steps(console, [3.0, 2.0])
    assert capsys.readouterr().out == ""
    console.print_summary(state, save_folder="runs/mine")
    assert capsys.readouterr().out.startswith("finished: 2 steps, 200 tokens in 0:00:04; runs/mine\n")


@pytest.mark.parametrize(
    ("values", "mean"), [([1.0, 2.0], 1.5), ([math.nan, math.inf, 2.0], 2.0), ([math.nan], None), ([], None)]
)
def test_losses_that_are_not_finite_are_left_out(values: list[float], mean: float | None) -> None:
    assert mean_finite(values) == mean
