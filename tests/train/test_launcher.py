"""The launcher of `streaming-rwkv train processes=N`: ranks, their ends, and signals, without torch."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.train.launcher import Ranks, launch

LAUNCH = """
import sys
from streaming_rwkv.train.launcher import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], processes=int(sys.argv[2])))
"""


def launcher(program: str, *, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCH, textwrap.dedent(program), str(processes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_each_rank_knows_its_place_and_rank_0_writes() -> None:
    program = """
        import os
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
        assert os.environ["MASTER_PORT"].isdigit()
        print(*(os.environ[name] for name in names))
    """
    assert ended(launcher(program, processes=3)) == (0, "0 0 3 3 0 127.0.0.1\n", "")


def test_the_output_of_a_rank_that_failed_is_shown_and_the_others_are_stopped() -> None:
    program = """
        import os, signal, sys
        if os.environ["RANK"] == "1":
            sys.exit("no memory here")
        signal.pause()
    """
    assert ended(launcher(program, processes=3)) == (1, "", "rank 1 ended with status 1:\nno memory here\n")


def test_rank_0_reports_its_own_failure() -> None:
    program = """
        import os, signal, sys
        if os.environ["RANK"] == "0":
            sys.exit("error: no such file")
        signal.pause()
    """
    assert ended(launcher(program, processes=2)) == (1, "", "error: no such file\n")


def test_a_rank_that_was_killed_is_named() -> None:
    program = """
        import os, signal
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    """
    assert ended(launcher(program, processes=2)) == (
        128 + 9,
        "",
        "rank 0 was ended by SIGKILL, most likely for want of memory (`dmesg` tells); the same command resumes from "
        "the newest checkpoint\n",
    )


def test_a_rank_that_was_killed_is_the_cause_of_the_others_failures(capsys: pytest.CaptureFixture[str]) -> None:
    program = """
        import os, signal, sys
        if os.environ["RANK"] == "0":
            sys.exit("error: another rank does not answer")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ranks = Ranks([sys.executable, "-c", textwrap.dedent(program)], 2)
    for process in ranks._processes:
        process.wait(timeout=250)
    assert ranks.wait() == 128 + 9
    assert capsys.readouterr().err.startswith("rank 1 was ended by SIGKILL, most likely for want of memory")


def wait_for_ranks(ready: Path, count: int) -> None:
    """Wait until this number of ranks has written a byte to a pipe."""
    with open(ready, "rb") as pipe:
        for _ in range(count):
            while pipe.read(1) != b"x":  # the next rank may open it a moment later
                continue


SAVES = """
    import os, signal, sys
    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher repeats it while this process ends
        print("stopped at step 3", flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes it on as SIGTERM
    own = os.open(sys.argv[1] if len(sys.argv) > 1 else os.environ["READY"], os.O_WRONLY)
    os.write(own, b"x")
    while True:
        signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_every_rank_and_nothing_else_is_said(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    monkeypatch.setenv("READY", str(ready))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started by
    process = launcher(SAVES, processes=2)
    signal.signal(signal.SIGHUP, before)
    wait_for_ranks(ready, 2)
    process.send_signal(number)
    assert ended(process) == (143, "stopped at step 3\n", "")


def test_a_rank_that_stands_still_does_not_keep_a_run_that_was_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others fail, since it does not answer; it is killed."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    monkeypatch.setattr("streaming_rwkv.train.launcher.STOP_SECONDS", 0.5)
    program = f"""
        import os, signal, sys
        fail = lambda *_: sys.exit("error: another rank does not answer")
        signal.signal(signal.SIGTERM, fail if os.environ["RANK"] == "0" else signal.SIG_IGN)
        own = os.open({str(ready)!r}, os.O_WRONLY)
        os.write(own, b"x")
        while True:
            signal.pause()
    """
    ranks = Ranks([sys.executable, "-c", textwrap.dedent(program)], 2)
    wait_for_ranks(ready, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.wait() == 1
    assert ranks._processes[1].returncode == -signal.SIGKILL
    assert capfd.readouterr().err == "error: another rank does not answer\n"


def test_a_second_interrupt_ends_a_run_whose_ranks_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    monkeypatch.setattr("streaming_rwkv.train.launcher.STOP_SECONDS", 0.5)
    program = f"""
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        own = os.open({str(ready)!r}, os.O_WRONLY)
        os.write(own, b"x")
        while True:
            signal.pause()
    """
    ranks = Ranks([sys.executable, "-c", textwrap.dedent(program)], 1)
    wait_for_ranks(ready, 1)
    while ranks._kill_at is None:  # of two signals that follow closely, one may be lost
        os.kill(os.getpid(), signal.SIGINT)
    assert ranks.wait() == 128 + signal.SIGINT
    assert capfd.readouterr().err == "stopped at once; processes that did not answer were killed\n"


def test_ranks_that_do_not_listen_yet_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    monkeypatch.setenv("READY", str(ready))
    program = """
        import os, signal
        with open(os.environ["READY"], "wb") as pipe:
            pipe.write(b"x")
        signal.pause()
    """
    process = launcher(program, processes=1)
    wait_for_ranks(ready, 1)
    process.terminate()
    assert ended(process) == (143, "", "stopped before training began; the same command starts it again\n")


def test_more_ranks_than_a_machine_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"^processes: found 99,999, expected at most 1,024 on one machine"):
        launch([sys.executable, "-c", ""], processes=99_999)


def test_ranks_that_cannot_all_be_started_are_ended(tmp_path: Path) -> None:
    """A rank beyond the limit of open files ends those before it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    handler = signal.getsignal(signal.SIGTERM)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(len(taken) + 8) if number not in taken]
    program = f"import os, signal; open('{tmp_path}/' + str(os.getpid()), 'w'); signal.pause()"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[7] + 1, before[1]))
        with pytest.raises(
            UserError, match=r"process \d+ of 40 could not be started \(Too many open files\); start fewer"
        ):
            launch([sys.executable, "-c", program], processes=40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not [name for name in os.listdir(tmp_path) if Path(f"/proc/{name}").exists()]
    assert signal.getsignal(signal.SIGTERM) == handler
