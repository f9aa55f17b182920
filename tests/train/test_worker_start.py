"""A run whose loader processes cannot all be started ends, and says which limit stopped it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# The operating system refuses the third process, as it does at a limit of processes, files or memory.
PROGRAM = """
import multiprocessing.process as processes
import sys

from streaming_rwkv.processes import end_with
from streaming_rwkv.train.__main__ import main

start, started = processes.BaseProcess.start, 0


def refusing(process):
    global started
    started += 1
    if started == 3:
        raise OSError({number}, {text!r})
    start(process)


processes.BaseProcess.start = refusing
end_with(lambda: main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EAGAIN, "ulimit -u"), (errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "memory")]
)
def test_a_worker_that_cannot_start_ends_the_run(
    number: int, reason: str, write_data_set: Callable[..., Path], programs: ForkServer, tmp_path: Path
) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 24})
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(number=number, text=os.strerror(number)))
    done = programs.run(
        [
            sys.executable, script, "yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path / 'run'}",
            "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.workers=4",
            "log.tensorboard=false",
        ],
        cwd=ROOT,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert reason in error
    assert "data.workers" in error
    assert "Traceback" not in done.stderr
