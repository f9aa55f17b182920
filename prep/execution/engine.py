"""Who does the tasks: this process, processes beside it, or Ray.

`start` gives a `Run`: called with a task and items, it calls `task(job, item, report)` for each and yields (the item's
index, its result) as they come. What a task reports while it works goes to `on_report`.
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

from prep.execution.context import Job
from streaming_rwkv.config import UserError
from streaming_rwkv.extras import install_command
from streaming_rwkv.processes import die_with_parent

logger = logging.getLogger(__name__)

Task = Callable[[Job, Any, Callable[[Any], None]], Any]
Run = Callable[[Task, Sequence[Any]], Iterator[tuple[int, Any]]]


class WorkerError(UserError):
    """A worker process died."""


@contextlib.contextmanager
def start(job: Job, *, on_report: Callable[[Any], None], fork: bool = False) -> Iterator[Run]:
    """The engine of the job's configuration; workers end with the context.

    Args:
        fork: fork workers from this process. It saves them the imports, but is safe only while no thread of this
            process can hold a lock (a tokenizer that has encoded something has such threads).
    """
    if job.config.engine == "ray":
        with _ray(job, on_report) as run:
            yield run
    elif job.config.worker_count == 1:
        yield lambda task, items: ((index, task(job, item, on_report)) for index, item in enumerate(items))
    else:
        with _processes(job, on_report, fork=fork) as run:
            yield run


# --- processes ---


@dataclass(frozen=True)
class _Report:
    content: Any


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    trace: str


@contextlib.contextmanager
def _processes(job: Job, on_report: Callable[[Any], None], *, fork: bool) -> Iterator[Run]:
    """Workers that are forked from one process which has loaded the tokenizer: it costs seconds and memory once."""
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    ours, theirs = zip(*[context.Pipe() for _ in range(job.config.worker_count)], strict=True)
    parent = context.Process(target=_parent, args=(job, theirs, ours if fork else ()), name="prep-parent")
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
            match _receive(ready):
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


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        raise _died() from None


def _died() -> WorkerError:
    return WorkerError(
        "a worker process died, most likely killed for want of memory (`dmesg` tells); run the same command again "
        "with fewer workers: finished work is kept"
    )


def _parent(job: Job, connections: Sequence[Connection], inherited: Sequence[Connection]) -> None:
    for connection in inherited:  # or a worker would hold the other end of its own line open
        connection.close()
    starter = multiprocessing.parent_process()
    assert starter is not None
    die_with_parent(starter.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone; the one that was started decides
    os.environ["RAYON_NUM_THREADS"] = "1"  # the workers fill the cores already
    try:
        job.tokenizer.load()
    except UserError as error:
        for connection in connections:
            connection.send(_Failure(error, traceback.format_exc()))
        return
    workers = []
    parent = os.getpid()
    for connection in connections:
        worker = os.fork()
        if worker == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            die_with_parent(parent)
            _work(job, connection)
            os._exit(0)
        workers.append(worker)
    for connection in connections:
        connection.close()
    for worker in workers:
        os.waitpid(worker, 0)


def _work(job: Job, connection: Connection) -> None:
    """Do tasks until the other side closes the connection."""

    def report(content: Any) -> None:
        connection.send(_Report(content))

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task, item = connection.recv()
            try:
                answer = task(job, item, report)
            except Exception as error:  # noqa: BLE001  # raised again by the process that waits for it
                answer = _Failure(_portable(error), traceback.format_exc())
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # any class can define how it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- Ray ---


@contextlib.contextmanager
def _ray(job: Job, on_report: Callable[[Any], None]) -> Iterator[Run]:
    """The same tasks on a Ray cluster: the one that RAY_ADDRESS names, or one on this machine."""
    try:
        import ray
    except ImportError:
        raise UserError(f"engine: 'ray' is not installed; run {install_command('ray')}, on every node") from None
    started = not ray.is_initialized()
    if started:
        # "local", or a cluster that somebody else has started here would be joined.
        local = {"address": "local", "num_cpus": job.config.worker_count, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else local))
        except ConnectionError as error:
            raise UserError(
                f"engine: no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error}); start one "
                "with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    shared_job = ray.put(pickle.dumps(job))
    do = ray.remote(_do_for_ray)

    def run(task: Task, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = list(enumerate(items))[::-1]
        pending: dict[Any, int] = {}
        while waiting or pending:
            # Not all at once: a million queued tasks are a burden to the scheduler.
            while waiting and len(pending) < 4 * int(ray.cluster_resources().get("CPU", 1)):
                index, item = waiting.pop()
                pending[do.remote(task, shared_job, item)] = index
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


def _do_for_ray(task: Task, pickled_job: bytes, item: Any) -> tuple[Any, list[Any]]:
    reports: list[Any] = []
    return task(_unpickled(pickled_job), item, reports.append), reports


@functools.lru_cache(maxsize=1)
def _unpickled(job: bytes) -> Job:
    """One tokenizer for all tasks of a Ray process."""
    loaded: Job = pickle.loads(job)
    return loaded
