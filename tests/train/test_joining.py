"""Ranks that wait for each other before a run starts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming_rwkv.distributed import LauncherError, rank_environment
from streaming_rwkv.train.startup import join_ranks
from tests.fork_server import ROOT, ForkServer
from tools.ports import free_ports


def test_ranks_that_do_not_meet_are_told_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(1, 2, port=1).items():  # where nothing listens
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LauncherError, match=r"^the ranks of this run cannot meet at 127\.0\.0\.1:1 \(MASTER_ADDR, "):
        join_ranks("cpu", timeout_seconds=1)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_sigterm_ends_a_rank_that_waits_for_the_others(
    write_data_set: Callable[..., Path], programs: ForkServer, tmp_path: Path
) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 4})
    port = free_ports(1)[0]
    settings = ["yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path / 'run'}"]
    with open(tmp_path / "log", "wb") as log:
        process = programs.popen(
            [sys.executable, "train.py", *settings],
            cwd=ROOT,
            env=os.environ | rank_environment(0, 2, port=port),
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 250
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()  # rank 0 listens while it waits
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=250) == -signal.SIGTERM, (tmp_path / "log").read_text()
