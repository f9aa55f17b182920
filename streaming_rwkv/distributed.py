"""Ranks of a distributed run: this process's rank, collectives, and work that one rank does for all.

A rank is one process of a run. Each node has a local rank 0, for work that is done once per machine; rank 0 is for work
that is done once per run. Without a process group this process is the only rank.

Every function below "Collectives" must be called by all ranks, in the same order. torch is imported on first use, so
that the functions that need only the environment stay fast.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from streaming_rwkv.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

# The numbers by which a launcher tells a process its rank: the smallest value of each, which is that of the only rank.
_LAUNCHER_NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
_RANKS_OF = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}  # each is below the number of these ranks
_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_HIGHEST_PORT = 65535
POLL_SECONDS = 0.5  # between two checks of the other ranks' progress


class OtherRankError(UserError):
    """An error of another rank; its text names the cause."""


class LauncherError(UserError):
    """An environment that does not tell this process its rank, or other ranks that cannot be reached.

    Each rank reports it: which of them reports for all is unknown.
    """


# This process


def has_launcher() -> bool:
    """Return True in a process that a launcher such as `composer` or `torchrun` started."""
    return bool(os.environ.get("LOCAL_RANK"))


def check_launcher() -> None:
    """Check the variables by which a launcher tells a process its rank, and unset those that are empty.

    Raises:
        LauncherError: one is no number or out of range, or some say that there are other ranks and others are missing.
    """
    for name in (*_LAUNCHER_NUMBERS, *_MEETING_PLACE):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    numbers = {name: _read_number(name, least) for name, least in _LAUNCHER_NUMBERS.items() if name in os.environ}
    telling = [f"{name}={value}" for name, value in numbers.items() if value != _LAUNCHER_NUMBERS[name]]
    if not telling:
        return
    missing = [name for name in (*_RANKS_OF, *_RANKS_OF.values(), *_MEETING_PLACE) if name not in os.environ]
    if missing:
        raise LauncherError(
            f"{', '.join(telling)} in the environment, without {', '.join(missing)}; expected all of them, as a "
            "launcher sets them, or none: unset the former to train in one process, or start with processes=N or "
            "`composer` (docs/cluster.md)"
        )
    for name, ranks in _RANKS_OF.items():
        _read_number(name, 0, numbers[ranks] - 1, below=f", below {ranks}")
    _read_number("MASTER_PORT", 1, _HIGHEST_PORT)
    if numbers["WORLD_SIZE"] % numbers["LOCAL_WORLD_SIZE"]:
        raise LauncherError(
            f"WORLD_SIZE: found {numbers['WORLD_SIZE']} in the environment, expected a multiple of LOCAL_WORLD_SIZE, "
            f"{numbers['LOCAL_WORLD_SIZE']}, as all nodes have equally many ranks; fix the launcher"
        )


def _read_number(name: str, least: int, most: int | None = None, *, below: str = "") -> int:
    text = os.environ[name]
    number = int(text) if re.fullmatch("0|[1-9][0-9]{0,8}", text) else -1
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}{below}"
        raise LauncherError(
            f"{name}: found {text[:80]!r} in the environment, expected a whole number, {allowed}, as launchers set it; "
            "unset it, or fix the launcher"
        )
    return number


def forget_launcher() -> None:
    """Unset a launcher's variables, in a command that computes alone: libraries would wait for the other ranks."""
    for name in (*_LAUNCHER_NUMBERS, *_MEETING_PLACE):
        os.environ.pop(name, None)


def is_local_rank_zero() -> bool:
    """Return True in one process of each node; works before the process group exists."""
    return (os.environ.get("LOCAL_RANK") or "0") == "0"


def is_distributed() -> bool:
    """Return True once a process group exists."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return this process's number among all ranks."""
    from torch import distributed

    return distributed.get_rank() if is_distributed() else 0


def is_rank_zero() -> bool:
    """Return True in one process of the run."""
    return rank() == 0


def world_size() -> int:
    """Return the number of ranks."""
    from torch import distributed

    return distributed.get_world_size() if is_distributed() else 1


def local_world_size() -> int:
    """Return the number of ranks on this node; works before the process group exists."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or "1")


def rank_environment(local_rank: int, count: int, *, port: int) -> Mapping[str, str]:
    """Return the variables that tell a process its rank, as the launcher `composer` sets them."""
    return {
        "RANK": str(local_rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


# Collectives


def barrier() -> None:
    """Wait until every rank has called this."""
    from torch import distributed

    if is_distributed():
        distributed.barrier()


def all_gather_object(value: Value) -> list[Value]:
    """Return every rank's `value`, in the order of ranks. Values are pickled."""
    from torch import distributed

    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Value) -> Value:
    """Return rank 0's `value` on every rank; the others' are ignored."""
    return all_gather_object(value if is_rank_zero() else None)[0]  # type: ignore[return-value]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all ranks, in place, and return it."""
    from torch import distributed

    if is_distributed():
        distributed.all_reduce(tensor)
    return tensor


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise minimum over all ranks, in place, and return it."""
    from torch import distributed

    if is_distributed():
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MIN)
    return tensor


def run_on_all(work: Callable[[], Value] | None) -> Value | None:
    """Run each rank's `work`, if it has any, and wait for all ranks without a time limit.

    A collective that waited for another rank's download would time out, so ranks poll each other meanwhile. An error
    of one rank is raised on every rank.

    Returns:
        The result of this rank's work.
    Raises:
        OtherRankError: the work of another rank ended with a `UserError`.
    """
    given: list[Value] = []
    problem: list[BaseException] = []

    def target() -> None:
        try:
            if work is not None:
                given.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below, in the main thread
            problem.append(error)

    thread = threading.Thread(target=target, name="run_on_all", daemon=True)
    thread.start()
    while not all(all_gather_object(not thread.is_alive())):
        thread.join(POLL_SECONDS)
    if problem and not isinstance(problem[0], UserError):
        raise problem[0]
    failures = [text for text in all_gather_object(str(problem[0]) if problem else None) if text is not None]
    if failures:
        raise problem[0] if problem else OtherRankError(failures[0])
    return given[0] if given else None


def run_on_rank_zero(work: Callable[[], Value]) -> Value | None:
    """Run `work` on rank 0 while the others wait; the result is returned on rank 0 alone and need not be pickled."""
    return run_on_all(work if is_rank_zero() else None)


def run_on_local_rank_zero(work: Callable[[], Value]) -> Value | None:
    """Run `work` once on each node while the other ranks wait; the result is returned on local rank 0 alone."""
    return run_on_all(work if is_local_rank_zero() else None)


def result_of_rank_zero(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0 and return its result, pickled, on every rank."""
    return broadcast_object(run_on_rank_zero(work))  # type: ignore[return-value]
