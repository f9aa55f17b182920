"""No process outlives its parent or its own work."""

from __future__ import annotations

import gc
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from streaming_rwkv.processes import without_garbage_collection

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import signal, time
from streaming_rwkv.processes import die_with_parent
{call}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
ENDING = """
import atexit, sys, threading, time
from streaming_rwkv.processes import end_with
def finish_writing():
    time.sleep(0.2)
    print("written")
atexit.register(print, "closed")
threading.Thread(target=finish_writing).start()
def main():
    {body}
end_with(main)
"""


def orphan(call: str) -> psutil.Process:
    """A child whose parent has just got SIGKILL."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD.format(call=call)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=250)
    return child


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_process_dies_with_its_parent() -> None:
    child = orphan("die_with_parent()")
    deadline = time.monotonic() + 250
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_process_whose_parent_has_ended_before_it_asked_dies_too() -> None:
    program = "import os; from streaming_rwkv.processes import die_with_parent; die_with_parent(os.getpid())"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


def test_a_rank_asks_before_it_imports_what_takes_seconds() -> None:
    """It cannot know whether its launcher had ended before."""
    program = (
        "import os, sys, streaming_rwkv.train.__main__ as program\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        "program.die_with_parent = lambda: sys.exit(str({'torch', 'omegaconf', 'pydantic'} & set(sys.modules)))\n"
        "program.main(['no.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=False)
    assert done.stderr == "set()\n"


def test_without_the_call_the_process_would_outlive_its_parent() -> None:
    child = orphan("")
    time.sleep(0.5)
    assert is_alive(child)
    child.kill()


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return 3", 3, ""),
        ("return None", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(4)", 4, ""),
        ("sys.exit('no such file')", 1, "no such file"),
        ("raise ValueError('the cause')", 1, "ValueError: the cause"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_a_process_ends_as_any_other_does(body: str, status: int, error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(body=body)], capture_output=True, text=True, timeout=250, check=False
    )
    assert (done.returncode, done.stdout) == (status, "written\nclosed\n")
    assert done.stderr.strip().splitlines()[-1:] == ([error] if error else [])


def test_a_process_whose_reader_has_gone_ends_too() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDING.format(body="return 3")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=250) == 3


def test_a_process_that_never_had_an_output_ends_too() -> None:
    program = ENDING.format(body="return 3")
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, program], timeout=250, check=False
    )
    assert done.returncode == 3


def test_a_signal_during_the_end_of_a_process_is_harmless() -> None:
    body = """
    import os, signal
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Not for long: a signal just before the wait for this thread does not shorten the wait.
    threading.Thread(target=time.sleep, args=[2]).start()
    def signal_the_end():
        threading.main_thread().join()  # `threading._shutdown` lets it continue
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=signal_the_end).start()
    return 3
    """
    done = subprocess.run([sys.executable, "-c", ENDING.format(body=body)], timeout=250, check=False)
    assert done.returncode == 3


def test_processes_end_while_gloo_is_still_busy() -> None:
    command = [sys.executable, "-m", "tests.ending_worker", "15"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


HUNG_UP = """
import fcntl, os, signal, sys, termios, time
from contextlib import suppress
from pathlib import Path
from streaming_rwkv.console import prepare_output
from streaming_rwkv.processes import listen_to_stop_signals
prepare_output()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.{before})
asked = []
listen_to_stop_signals(asked.append)
os.write(2, b"x")
with suppress(OSError):
    os.read(0, 1)  # until the terminal is closed
while {is_asked} and not asked:
    time.sleep(0.01)
print("nobody reads this", flush=True)
Path(sys.argv[1]).write_text(str(asked))
"""


@pytest.mark.parametrize(("before", "asked"), [("SIG_DFL", [int(signal.SIGHUP)]), ("SIG_IGN", [])])
def test_a_closed_terminal_asks_to_stop_unless_that_is_ignored_and_is_no_error(
    before: str, asked: list[int], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    program = HUNG_UP.format(before=before, is_asked=bool(asked))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "asked")],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(theirs)
    assert process.stderr is not None
    with process.stderr as pipe:
        assert pipe.read(1) == b"x"
        os.close(ours)
        assert (pipe.read(), process.wait(timeout=250)) == (b"", 0)
    assert (tmp_path / "asked").read_text() == str(asked)


def test_garbage_collection_is_paused_and_continues_after_an_error() -> None:
    def fail() -> None:
        with without_garbage_collection():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_the_tracker_of_shared_memory_ignores_a_closed_terminal() -> None:
    """Its successor would answer each name that it does not know with a traceback."""
    program = """
from multiprocessing import resource_tracker
from pathlib import Path
import signal
from streaming_rwkv.processes import start_resource_tracker

start_resource_tracker()
assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
status = Path(f"/proc/{resource_tracker._resource_tracker._pid}/status").read_text()
ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
assert ignored & 1 << signal.SIGHUP - 1
"""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started by
    try:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    finally:
        signal.signal(signal.SIGHUP, before)
