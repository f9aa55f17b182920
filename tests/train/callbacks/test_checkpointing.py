"""Signals ask a run to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_rwkv.processes import STOP_SIGNALS
from streaming_rwkv.train.callbacks.checkpointing import Checkpointer
from streaming_rwkv.train.callbacks.clipping import ClipGradient
from streaming_rwkv.train.callbacks.consumption import Consumption
from tests.train.callbacks.run_state import STREAMS


@pytest.fixture
def signals_restored() -> Iterator[None]:
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize("others", [[], [signal.SIGTERM], [signal.SIGHUP]])
@pytest.mark.parametrize("comes_first", [True, False])
def test_one_ctrl_c_asks_to_stop_with_any_signal_of_the_launcher_and_a_second_one_stops(
    others: list[signal.Signals], comes_first: bool, tmp_path: Path
) -> None:
    checkpointer = Checkpointer(
        tmp_path,
        interval_steps=1,
        keep=1,
        last_step=1,
        run={},
        slots_before=lambda step: step,
        consumption=Consumption(STREAMS, interval_steps=1, last_step=100),
        clipping=ClipGradient(1.0, on_nonfinite="skip"),
    )
    checkpointer.listen()
    assert not checkpointer.asked_to_stop
    for number in [signal.SIGINT, *others] if comes_first else [*others, signal.SIGINT]:
        os.kill(os.getpid(), number)
    assert checkpointer.asked_to_stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
