"""Engines that run tasks: this process, processes beside it, or Ray.

`start` returns a `Run`. It is called with a task and items, calls `task(context, item, report)` for each item, and
yields the index and the result of each item as it is finished. Reports of running tasks go to `on_report`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from prep.execution.context import BuildContext
from prep.execution.tasks import Run, Task
from prep.inputs.files import Unit
from streaming_rwkv.config import UserError
from streaming_rwkv.errors import panics_as_errors
from streaming_rwkv.extras import install_command
from streaming_rwkv.limits import LIMIT_ERRORS
from streaming_rwkv.processes import die_with_parent

logger = logging.getLogger(__name__)


class WorkerError(UserError):
    """A worker process died."""


@contextlib.contextmanager
def start(context: BuildContext, *, on_report: Callable[[Any], None], fork: bool = False) -> Iterator[Run]:
    """Start the engine that the configuration names; its workers end with the `with` block.

    Args:
        fork: fork workers from this process. This saves their imports, but is safe only while no thread of this
            process can hold a lock (a tokenizer that has encoded something has such threads).
    """
    if context.config.engine == "ray":
        with _ray(context, on_report) as run:
            yield run
    elif context.config.worker_count == 1:
        yield lambda task, items: ((index, _do(task, context, item, on_report)) for index, item in enumerate(items))
    else:
        with _processes(context, on_report, fork=fork) as run:
            yield run


def _do(task: Task, context: BuildContext, item: Any, on_report: Callable[[Any], None]) -> Any:
    with panics_as_errors():
        return task(context, item, on_report)


# --- processes ---


@dataclass(frozen=True)
class _Report:
    content: Any


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    trace: str


@contextlib.contextmanager
def _processes(context: BuildContext, on_report: Callable[[Any], None], *, fork: bool) -> Iterator[Run]:
    """Fork all workers from one process that has loaded the tokenizer, which takes seconds and memory only once."""
    processes: Any = multiprocessing.get_context("fork" if fork else "spawn")
    ours, theirs = zip(*[processes.Pipe() for _ in range(context.config.worker_count)], strict=True)
    parent = processes.Process(target=_parent, args=(context, theirs, ours if fork else ()), name="prep-parent")
    parent.start()
    for connection in theirs:
        connection.close()
    try:
        yield lambda task, items: _distribute(task, items, list(ours), on_report)
    except BaseException:
        parent.terminate()  # the workers die with it
        raise
    finally:
        for connection in ours:
            connection.close()
        parent.join()


def _distribute(
    task: Task, items: Sequence[Any], connections: list[Connection], on_report: Callable[[Any], None]
) -> Iterator[tuple[int, Any]]:
    waiting = list(enumerate(items))[::-1]
    busy: dict[Connection, int] = {}

    def give_next(connection: Connection) -> None:
        if waiting:
            busy[connection], item = waiting.pop()
            _send(connection, (task, item))

    for connection in connections:
        give_next(connection)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            match _receive(ready, items[busy[ready]]):
                case _Report(content):
                    on_report(content)
                case _Failure(error, trace):
                    logger.debug("in a worker:\n%s", trace)
                    raise error
                case result:
                    index = busy.pop(ready)
                    give_next(ready)
                    yield index, result


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:
        raise _died() from None


def _receive(connection: Connection, item: Any) -> Any:
    """Receive a worker's next message, while it works on `item`."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        raise _died(f" at {item.where}" if isinstance(item, Unit) else "") from None


def _died(where: str = "") -> WorkerError:
    return WorkerError(
        f"a worker process died{where}, most likely killed for want of memory (`dmesg` tells), unless a hook ended it "
        "(os._exit); run the same command again with fewer workers: finished work is kept. If one dies there again, "
        "download the file again, or choose another tokenizer"
    )


def _parent(context: BuildContext, connections: Sequence[Connection], inherited: Sequence[Connection]) -> None:
    for connection in inherited:  # or a worker would hold the other end of its own connection open
        connection.close()
    starter = multiprocessing.parent_process()
    assert starter is not None
    die_with_parent(starter.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process decides
    os.environ["RAYON_NUM_THREADS"] = "1"  # the workers fill the cores already
    try:
        context.tokenizer.load()
    except (UserError, *LIMIT_ERRORS) as error:
        _refuse(connections, error)
        return
    workers = []
    parent = os.getpid()
    for number, connection in enumerate(connections):
        try:
            worker = os.fork()
        except OSError as error:  # a limit of processes or memory
            _refuse(connections[number:], error)
            break
        if worker == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            die_with_parent(parent)
            _work(context, connection)
            os._exit(0)
        workers.append(worker)
    for connection in connections:
        connection.close()
    for worker in workers:
        os.waitpid(worker, 0)


def _refuse(connections: Sequence[Connection], error: Exception) -> None:
    """Answer with an error for workers that do not exist, and wait until the other side closes the connections."""
    for connection in connections:
        connection.send(_Failure(_portable(error), traceback.format_exc()))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connections[0].recv()


def _work(context: BuildContext, connection: Connection) -> None:
    """Run tasks until the other side closes the connection."""

    def report(content: Any) -> None:
        connection.send(_Report(content))

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task, item = connection.recv()
            try:
                answer = _do(task, context, item, report)
            except Exception as error:  # noqa: BLE001  # raised again by the main process
                answer = _Failure(_portable(error), traceback.format_exc())
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """Return the error itself if it can be pickled, or its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # any class can define how it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- Ray ---


@contextlib.contextmanager
def _ray(context: BuildContext, on_report: Callable[[Any], None]) -> Iterator[Run]:
    """Run tasks on a Ray cluster: the one that RAY_ADDRESS names, or a new one on this machine."""
    try:
        import ray
    except ImportError:
        raise UserError(f"engine: 'ray' is not installed; run {install_command('ray')}, on every node") from None
    started = not ray.is_initialized()
    if started:
        # Without "local", a cluster that another user has started here would be joined.
        local = {"address": "local", "num_cpus": context.config.worker_count, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else local))
        except ConnectionError as error:
            raise UserError(
                f"engine: no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error}); start one "
                "with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    shared_context = ray.put(pickle.dumps(context))
    do = ray.remote(_do_for_ray)

    def run(task: Task, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = list(enumerate(items))[::-1]
        pending: dict[Any, int] = {}
        while waiting or pending:
            # A limited number at once: a million queued tasks slow the scheduler down.
            while waiting and len(pending) < 4 * int(ray.cluster_resources().get("CPU", 1)):
                index, item = waiting.pop()
                pending[do.remote(task, shared_context, item)] = index
            (done,), _ = ray.wait(list(pending))
            try:
                result, reports = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            for content in reports:
                on_report(content)
            yield pending.pop(done), result

    try:
        yield run
    finally:
        if started:
            ray.shutdown()


def _do_for_ray(task: Task, pickled_context: bytes, item: Any) -> tuple[Any, list[Any]]:
    reports: list[Any] = []
    return _do(task, _unpickled(pickled_context), item, reports.append), reports


@functools.lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> BuildContext:
    """Unpickle the context once, so that all tasks of a Ray process share one tokenizer."""
    loaded: BuildContext = pickle.loads(pickled)
    return loaded
