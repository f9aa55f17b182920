"""Pairs of processes that end at once after a collective; started by test_processes.py:

python -m tests.ending_worker PAIRS [plain|destroy]

The main thread of each keeps the interpreter to itself, so that gloo's threads nearly always get there too late: with
`plain`, the interpreter's own end, or `destroy`, which takes the process group apart first, some hang or abort.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from streaming_rwkv.processes import end_with
from tools.ports import free_ports

STATUS = 7
SECONDS = 120  # more than a process that ends needs, also on a busy machine


def communicate(rank: int, port: int) -> int:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    sys.setswitchinterval(1000)
    for number in range(3):
        gathered = [None, None]
        dist.all_gather_object(gathered, (rank, number))
        assert gathered == [(0, number), (1, number)]
    return STATUS


def end(rank: int, port: int, how: str) -> None:
    if how == "ours":
        end_with(lambda: communicate(rank, port))
    status = communicate(rank, port)
    if how == "destroy":
        dist.destroy_process_group()
    sys.exit(status)


def status_of(process: int) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "hangs"


def main(pairs: int, how: str) -> int:
    found = []
    for _ in range(pairs):
        (port,) = free_ports(1)
        processes = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                end(rank, port, how)
            processes.append(process)
        found += [status_of(process) for process in processes]
    print({status: found.count(status) for status in sorted(set(found))})
    return int(set(found) != {str(STATUS)})


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "ours"))
