"""Launcher of several processes on this machine: `streaming-rwkv train CONFIG processes=N`.

It gives each rank the environment variables that `composer` gives, without importing torch or Composer itself, and
prints nothing but the error of a rank that failed. Several machines need `composer` or a scheduler: docs/cluster.md.

Local rank 0 writes to the terminal. The output of the other ranks goes to temporary files, and is printed if their rank
was the one that failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryFile
from typing import IO

from streaming_rwkv.distributed import rank_environment
from streaming_rwkv.errors import UserError
from streaming_rwkv.processes import STOP_SIGNALS, listen_to_stop_signals

STOP_SECONDS = 30.0  # between SIGTERM and SIGKILL, for a rank to end its step and to write a checkpoint
STOPPED = {128 + number for number in STOP_SIGNALS}  # exit statuses of ranks that were asked to stop
POLL_SECONDS = 0.1
MOST_PROCESSES = 1024  # on one machine
SHOWN_BYTES = 1 << 14  # of the end of a failed rank's output


class Ranks:
    """The processes of one run on this machine; a request to stop (Ctrl-C, SIGTERM, SIGHUP) is passed on to all.

    Ranks get SIGTERM for each: a terminal sends Ctrl-C to them too, and they take the second for "at once".
    """

    def __init__(self, command: Sequence[str], count: int) -> None:
        self.asked_to_stop = False
        self._interrupts = 0
        self._kill_at: float | None = None
        self._outputs: list[IO[bytes] | None] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._handlers = listen_to_stop_signals(self._ask_to_stop)
        port = free_port()
        try:
            for local_rank in range(count):
                self._start(command, os.environ | rank_environment(local_rank, count, port=port))
        except OSError as error:
            started = len(self._processes)
            self._close()
            raise UserError(
                f"processes: process {started + 1} of {count} could not be started ({error.strerror}); start fewer, "
                "or raise the limits of open files (ulimit -n) and of processes (ulimit -u)"
            ) from None

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        output = TemporaryFile() if self._processes else None  # noqa: SIM115 - until `wait` returns
        self._outputs.append(output)
        self._processes.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT if output else None)
        )

    def _ask_to_stop(self, number: int) -> None:
        self.asked_to_stop = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and self._kill_at is None:  # ranks stop at once, unless they stand still
            self._kill_at = time.monotonic() + STOP_SECONDS
        self._terminate()

    def _terminate(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.terminate()

    def wait(self) -> int:
        """Wait for all ranks; if one fails, stop the others. Return the first failed rank's status, or 0."""
        try:
            failed = self._wait_for_failure()
            if failed is None:
                return 0
            self._terminate()
            # After a request to stop they have written a checkpoint together, and rank 0 may still be uploading it.
            self._end_all(seconds=None if self._has_stopped(failed) else STOP_SECONDS)
            return self._status(failed)
        finally:
            self._close()

    def _close(self) -> None:
        """Kill the ranks that are left, and give back signals and files."""
        self._end_all(seconds=0.0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for output in filter(None, self._outputs):
            output.close()

    def _wait_for_failure(self) -> int | None:
        """Return the number of the first rank that ends with a status other than 0, or None when all have ended."""
        while True:
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._end_all(seconds=0.0)
            statuses = [process.poll() for process in self._processes]
            failed = [local_rank for local_rank, status in enumerate(statuses) if status]
            if failed or None not in statuses:
                # A rank that was killed is the cause of the others' failures.
                return min(failed, key=lambda local_rank: ((statuses[local_rank] or 0) > 0, local_rank), default=None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[statuses.index(None)].wait(timeout=POLL_SECONDS)

    def _has_stopped(self, failed: int) -> bool:
        """Return True if a rank ended because it was asked to, not for a failure."""
        status = self._processes[failed].returncode
        return self.asked_to_stop and (128 - status if status < 0 else status) in STOPPED

    def _end_all(self, *, seconds: float | None) -> None:
        """Wait for all ranks, and after this time kill those that are left."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes):
            times = [when for when in (deadline, self._kill_at) if when is not None]
            if times and time.monotonic() >= min(times):
                for process in self._processes:
                    process.kill()
                    process.wait()
            time.sleep(POLL_SECONDS)

    def _status(self, failed: int) -> int:
        """Return the run's exit status, after saying why it ended if rank 0 could not."""
        status, output = self._processes[failed].returncode, self._outputs[failed]
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            print("stopped at once; processes that did not answer were killed", file=sys.stderr, flush=True)
            return 128 + signal.SIGINT
        if self._has_stopped(failed):
            if self._processes[0].returncode < 0:  # before it listened to signals
                print("stopped before training began; the same command starts it again", file=sys.stderr, flush=True)
        elif output is not None:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - SHOWN_BYTES))
            text = output.read().decode(errors="replace").rstrip()
            if text or status > 0:
                print(f"rank {failed} ended with status {status}:\n{text}", file=sys.stderr, flush=True)
        if status < 0 and not self._has_stopped(failed):
            print(f"rank {failed} was ended by {_signal(status)}", file=sys.stderr, flush=True)
        return 128 - status if status < 0 else status


def _signal(status: int) -> str:
    """Return the signal of a negative exit status, with its likely cause and what to do."""
    cause = ", most likely for want of memory (`dmesg` tells)" if -status == signal.SIGKILL else ""
    return f"{signal.Signals(-status).name}{cause}; the same command resumes from the newest checkpoint"


def free_port() -> int:
    """Return a port that no process listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(command: Sequence[str], *, processes: int) -> int:
    """Run `command` in this number of processes, the ranks of one run, and return the run's exit status.

    Raises:
        UserError: more than MOST_PROCESSES, or more than the system allows.
    """
    if processes > MOST_PROCESSES:
        raise UserError(
            f"processes: found {processes:,}, expected at most {MOST_PROCESSES:,} on one machine, one for each GPU; "
            "for several machines see docs/cluster.md"
        )
    return Ranks(command, processes).wait()
