"""A run's save folder on object storage: all that an empty machine needs to go on.

    {remote}/checkpoints/step-00000500/…              as in the save folder; each rank brings the files that it wrote
    {remote}/checkpoints/step-00000500/uploading.0    begun by rank 0; removed once the mark is there
    {remote}/checkpoints/step-00000500/complete.json  last: what has it is whole
    {remote}/writer.json                              who may write here: the run that began last
    {remote}/{config.yaml, metrics.jsonl, samples.jsonl, …, tokenizer/, tensorboard/}
                                                      with each checkpoint, and at the end of the run

Files go up in a thread while training goes on, but one checkpoint at a time: the next is written when the one before is
up, so what waits for a slow network never grows. The thread calls no collective. Ranks learn from each other in the
reduction that ends each step (`train.callbacks.Checkpointer`), and enter the next stage at the same step:

    idle ─ begin ─▶ files ─ no rank is busy: advance ─▶ sealing (the leader: logs, mark, pruning) ─ advance ─▶ idle

A checkpoint's folder without mark is an upload that was interrupted if it has an `uploading.…`, and damage if it has
not. A mark whose files are not all there is damage. Where there is nothing but damage, a person has to decide.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal

from streaming_rwkv.config import UserError
from streaming_rwkv.distributed import (
    all_gather_object,
    broadcast_object,
    is_local_rank_zero,
    is_rank_zero,
    rank,
    result_of_rank_zero,
    run_on_all,
    run_on_local_rank_zero,
    run_on_rank_zero,
)
from streaming_rwkv.filesystem import fsync, is_temporary, temporary_path
from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.model.completion_mark import LARGEST_MARK_BYTES, MARK_NAME
from streaming_rwkv.model.weights import CheckpointError
from streaming_rwkv.shards import TOKENIZER_FOLDER, sha256_of_file
from streaming_rwkv.storage import ObjectMissing, Store, open_store
from streaming_rwkv.train.checkpoints.local import (
    NAME,
    Checkpoint,
    check_same_settings,
    find_problem,
    install,
    newest_checkpoint,
    parse_mark,
    read_mark,
    replaced_path,
    step_name,
    wrote,
)

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
UPLOADING = "uploading."
WRITER = "writer.json"
LOGS = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "microbatch.json", "tracking-id", TOKENIZER_FOLDER, "tensorboard"
)  # fmt: skip
FETCH_THREADS = 4
LARGEST_WRITER_BYTES = 1 << 12
POLL_SECONDS = 0.1


class MirrorError(UserError):
    """The run's folder on object storage cannot be written, or what lies there cannot be used."""


class Mirror:
    """This rank's part in keeping a run's folder in a store up to date; all ranks call the methods together."""

    def __init__(self, store: Store, folder: Path, *, keep: int) -> None:
        """
        Args:
            store: the run's folder; its timeout says how long an upload may get nowhere before the run stops.
            folder: the save folder; nothing is changed there.
            keep: so many checkpoints stay in the store, the newest; 0 keeps all.
        """
        self.store = store
        self.folder = folder
        self.keep = keep
        self._stage: Literal["idle", "files", "sealing"] = "idle"
        self._checkpoint = Path()
        self._sent: dict[str, tuple[int, int]] = {}  # logs by name: time and size of what went up
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._writer: bytes | None = None  # as we wrote it

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._problem is not None and not self.busy

    def take_over(self) -> None:
        """From now on this run alone writes here. One that still does, elsewhere, stops at its next upload.

        A scheduler that starts a job again cannot always tell that the first one is dead. What began last goes on,
        so nobody has to clear away the claim of a machine that is lost.
        """
        writer = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._writer = broadcast_object(json.dumps(writer).encode())
        content = self._writer
        run_on_rank_zero(lambda: self.store.put_bytes(content, WRITER))

    def begin(self, checkpoint: Path, *, all_on_rank_zero: bool = False) -> None:
        """Have a whole local checkpoint go up; `all_on_rank_zero` if the ranks of another world wrote it."""
        assert self._stage == "idle", "the checkpoint before this one is not up yet"
        names = sorted(read_mark(checkpoint)["files"])
        mine = [name for name in names if (is_rank_zero() if all_on_rank_zero else wrote(name))]
        self._stage, self._checkpoint = "files", checkpoint
        if mine:
            self._run(lambda: self._send_files(checkpoint, mine))

    def advance(self) -> None:
        """No rank is busy, and none has failed: go on to the next stage."""
        match self._stage:
            case "files":
                self._stage = "sealing"
                if is_rank_zero():
                    checkpoint = self._checkpoint
                    self._run(lambda: self._seal(checkpoint))
            case "sealing":
                self._stage = "idle"

    def settle(self) -> bool:
        """Wait until the checkpoint is up; False if a rank's upload failed."""
        while self._stage != "idle":
            flags = all_gather_object((self.busy, self.failed))
            if any(failed for _, failed in flags):
                return False
            if any(busy for busy, _ in flags):
                time.sleep(POLL_SECONDS)
            else:
                self.advance()
        return True

    def finish(self) -> None:
        """Wait until the checkpoint is up, then bring the logs up to their end.

        Raises:
            MirrorError: an upload failed.
        """
        if not self.settle():
            raise self.error()
        self.send_logs()
        self.store.close()

    def send_logs(self) -> None:
        """Before the first step too: a store that cannot be written stops the run at once."""
        run_on_rank_zero(self._send_logs)

    def error(self) -> MirrorError:
        """Why an upload failed, whichever rank's it was."""
        problem = next(text for text in all_gather_object(self._problem) if text is not None)
        return MirrorError(
            f"{self._checkpoint.name} could not be uploaded: {problem}. Nothing is lost on this machine: the newest "
            f"checkpoint is in {self.folder / CHECKPOINTS}; once the cause is gone, the same command goes on from there"
        )

    def _run(self, work: Callable[[], None]) -> None:
        def target() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - `error` raises it, in the main thread
                self._problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

        # A daemon: a run that stops for another cause does not wait for its uploads.
        self._thread = threading.Thread(target=target, name="mirror", daemon=True)
        self._thread.start()

    def _check_writer(self) -> None:
        if self._writer is None:
            return
        try:
            found = self.store.get_bytes(WRITER, most=LARGEST_WRITER_BYTES)
        except ObjectMissing:  # removed by hand: nobody else's
            return
        if found != self._writer:
            raise MirrorError(
                f"{self.store.url(WRITER)}: another run has taken this place over: {found.decode(errors='replace')}; "
                "only one may write here, so stop the other, or give this one its own `save_remote`"
            )

    def _send_files(self, checkpoint: Path, names: Sequence[str]) -> None:
        self._check_writer()
        folder = f"{CHECKPOINTS}/{checkpoint.name}"
        files = read_mark(checkpoint)["files"]
        self.store.put_bytes(b"begun\n", f"{folder}/{UPLOADING}{rank()}")
        # This step may lie there from an earlier start: a mark must never stand over a mixture of both.
        self.store.delete([f"{folder}/{MARK_NAME}"])
        for name in names:
            self._check_writer()
            self.store.put_file(checkpoint / name, f"{folder}/{name}", sha256=files[name]["sha256"])

    def _seal(self, checkpoint: Path) -> None:
        self._send_logs()
        folder = f"{CHECKPOINTS}/{checkpoint.name}/"
        self._check_writer()
        self.store.put_bytes((checkpoint / MARK_NAME).read_bytes(), folder + MARK_NAME)
        self.store.delete(name for name in self.store.list(folder) if name.startswith(folder + UPLOADING))
        prune(self.store, keep=self.keep, last=checkpoint.name)

    def _send_logs(self) -> None:
        self._check_writer()
        for path in _log_files(self.folder):
            status = path.stat()
            name, state = path.relative_to(self.folder).as_posix(), (status.st_mtime_ns, status.st_size)
            if self._sent.get(name) != state:
                self.store.put_bytes(path.read_bytes(), name)  # one moment of it: training goes on writing
                self._sent[name] = state


def _log_files(folder: Path) -> list[Path]:
    found = [path for name in LOGS for path in (folder / name, *(folder / name).rglob("*"))]
    return sorted(path for path in found if path.is_file() and not is_temporary(path))


def prune(store: Store, *, keep: int, last: str) -> None:
    """Delete all but the `keep` newest whole checkpoints up to `last`, and interrupted uploads before it.

    One of a later step is damaged, or the run would have gone on from it; a person has to look at it.
    """
    listed = {name: files for name, files in _checkpoints(store).items() if _step(name) <= _step(last)}
    whole = [name for name in sorted(listed, key=_step) if MARK_NAME in listed[name]]
    kept = whole[-keep:] if keep else whole
    for name in listed:
        if name != last and name not in kept:
            # The mark first: killed in between, this must not leave a checkpoint with files missing.
            store.delete([f"{CHECKPOINTS}/{name}/{MARK_NAME}"])
            store.delete(f"{CHECKPOINTS}/{name}/{file}" for file in listed[name])


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _checkpoints(store: Store) -> dict[str, dict[str, int]]:
    """Checkpoint → file → bytes, of all that have a checkpoint's name."""
    listed: dict[str, dict[str, int]] = {}
    for key, size in store.list(f"{CHECKPOINTS}/").items():
        _, _, below = key.partition("/")
        name, _, file = below.partition("/")
        if NAME.fullmatch(name):
            listed.setdefault(name, {})[file] = size
    return listed


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpoint:
    """A whole checkpoint in the store."""

    name: str
    content: bytes  # of its mark

    @property
    def mark(self) -> dict[str, Any]:
        return parse_mark(self.content, where=self.name)

    @property
    def step(self) -> int:
        return int(self.mark["step"])


def newest_remote(store: Store, *, only: str | None = None) -> RemoteCheckpoint | None:
    """The newest whole checkpoint of the store (or the one named `only`), or None where none was ever finished.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
        StorageError: the store cannot be read.
    """
    problems: list[str] = []
    listed = {name: files for name, files in _checkpoints(store).items() if only in (None, name)}
    for name in sorted(listed, key=_step, reverse=True):
        files = listed[name]
        where = f"{CHECKPOINTS}/{name}/{MARK_NAME}"
        if MARK_NAME not in files:
            if not any(file.startswith(UPLOADING) for file in files):
                problems.append(f"{name}: no completion mark ({MARK_NAME})")
            continue
        try:
            found = RemoteCheckpoint(name=name, content=store.get_bytes(where, most=LARGEST_MARK_BYTES))
            bad = [
                f"{file} has {files.get(file, 'no')} bytes instead of {record['bytes']}"
                for file, record in found.mark["files"].items()
                if files.get(file) != record["bytes"]
            ]
        except CheckpointError as error:
            bad = [str(error)]
        if not bad:
            if problems:
                logger.warning("%s: going back to %s: %s", store.url(CHECKPOINTS), name, "; ".join(problems))
            return found
        problems.append(f"{name}: {bad[0]}")
    if problems:
        raise CheckpointError(
            f"{store.url(CHECKPOINTS)}: no checkpoint here is whole ({'; '.join(problems)}); restore one, or give the "
            "run another `save_remote` to start it again from its beginning"
        )
    return None


def check_place(store: Store, run: Mapping[str, Any], *, allow: frozenset[str]) -> None:
    """Refuse a place that holds another run's checkpoint, before anything is changed there; by all ranks.

    Raises:
        CheckpointError: its settings are others, but for those in `allow`. Two runs would remove each other's
            checkpoints.
        StorageError: the store cannot be read.
    """

    def check() -> None:
        try:
            remote = newest_remote(store)
        except CheckpointError:  # damage: `restore` says what to do
            return
        if remote is not None:
            check_same_settings(remote.mark, run, allow=allow, where=store.url(f"{CHECKPOINTS}/{remote.name}"))

    run_on_rank_zero(check)


def restore(store: Store | None, folder: Path) -> tuple[Checkpoint | None, bool]:
    """The newest whole checkpoint of this machine and the store, on each node's disk; by all ranks.

    The leader chooses: its disk may be the other nodes' too, or each may have its own. A node that lacks the chosen one
    fetches it, or all go on from the store's where that has an older one alone.

    Returns:
        The checkpoint, if any, and whether the store has it.
    Raises:
        CheckpointError: there are checkpoints, here or there, but none is whole on every node.
        StorageError: the store cannot be read, or damages what it gives.
    """
    root = folder / CHECKPOINTS

    def choose() -> tuple[int | None, RemoteCheckpoint | None]:
        local, remote, problems = None, None, []
        try:
            local = newest_checkpoint(root)
        except CheckpointError as error:
            problems.append(error)
        if store is not None:
            store.abort_unfinished()
            try:
                remote = newest_remote(store)
            except CheckpointError as error:
                problems.append(error)
        if problems and local is None and remote is None:
            raise problems[0]
        for problem in problems:
            logger.warning("%s; going on from what the other place has", problem)
        return local.step if local else None, remote

    step, remote = result_of_rank_zero(choose)
    if step is not None and (remote is None or step > remote.step):
        lacking = _nodes_without(root / step_name(step))
        if not lacking:
            return _local(root, step), False
        if remote is None:
            raise CheckpointError(
                f"{root / step_name(step)}: not whole on every node ({'; '.join(lacking)}); bring the files there, or "
                "move it away on every node to go on from the one before it (with `save_remote`, a node fetches what "
                "it lacks)"
            )
        if is_rank_zero():
            logger.warning("going back to step %d: %s (%s)", remote.step, root / step_name(step), "; ".join(lacking))
    if store is None or remote is None:
        return None, False
    if step is None or step < remote.step:  # the leader first: the other nodes may see its disk
        run_on_rank_zero(lambda: _fetch(store, remote, folder, logs=LOGS))
    run_on_local_rank_zero(lambda: _fetch(store, remote, folder))
    return _local(root, remote.step), True


def _nodes_without(path: Path) -> list[str]:
    """Each node where this checkpoint is not whole, and why."""
    problem = find_problem(path) if is_local_rank_zero() else None
    found = all_gather_object(problem and f"{socket.gethostname()}: {problem}")
    return [text for text in found if text is not None]


def _local(root: Path, step: int) -> Checkpoint:
    path = root / step_name(step)
    marks: list[dict[str, Any]] = []
    run_on_all(lambda: marks.append(read_mark(path)))
    return Checkpoint(path=path, mark=marks[0])


def _fetch(store: Store, remote: RemoteCheckpoint, folder: Path, *, logs: Sequence[str] = ()) -> None:
    """Make a checkpoint of the store whole on this disk, with `logs` of its run."""
    final = folder / CHECKPOINTS / remote.name
    if final.exists() and find_problem(final) is None:
        return
    logger.info("fetching %s", store.url(f"{CHECKPOINTS}/{remote.name}"))
    writing = temporary_path(final)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)

    def fetch(name: str) -> None:
        sha256 = remote.mark["files"][name]["sha256"]
        if (final / name).is_file() and sha256_of_file(final / name) == sha256:
            os.link(final / name, writing / name)
            return
        store.get_file(f"{CHECKPOINTS}/{remote.name}/{name}", writing / name, sha256=sha256)
        fsync(writing / name)

    with ThreadPoolExecutor(FETCH_THREADS) as executor:
        list(executor.map(fetch, sorted(remote.mark["files"])))
    _fetch_logs(store, folder, logs)
    if final.exists():  # not whole
        final.rename(replaced_path(final))
    install(writing, final, remote.content)


def _fetch_logs(store: Store, folder: Path, logs: Sequence[str]) -> None:
    for name in (name for log in logs for name in store.list(log)):
        path = PurePosixPath(name)
        if path.parts[0] in logs and ".." not in path.parts:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, folder / path)


@contextmanager
def local_checkpoint(location: str | Path) -> Iterator[Path]:
    """The path of `location`; of one in object storage, while it is needed, a copy with its run's tokenizer.

    Args:
        location: anything local; or s3://… of a run, for its newest checkpoint, or of one of its checkpoints.
    Raises:
        CheckpointError: nothing is there, or no whole checkpoint.
        LocationError: neither a local path nor s3://bucket/prefix.
        StorageError: the store cannot be read, or damages what it gives.
    """
    if not is_remote(location):
        if not Path(location).exists():
            raise CheckpointError(
                f"{location}: no such file or folder; give a run's save folder, one of its checkpoints, a .pth, or a "
                "Hugging Face folder"
            )
        yield Path(location)
        return
    with _run_of(location) as (store, name), TemporaryDirectory(prefix="checkpoint-") as temporary:
        found = _find(store, name, location)
        _fetch(store, found, Path(temporary), logs=[TOKENIZER_FOLDER])
        yield Path(temporary) / CHECKPOINTS / found.name


def node_checkpoint(location: str, folder: Path) -> Path:
    """Likewise for all ranks together: one and the same checkpoint, of which each node gets one copy, into `folder`."""
    if not is_remote(location):
        return Path(location)
    with _run_of(location) as (store, name):
        found = result_of_rank_zero(lambda: _find(store, name, location))
        run_on_rank_zero(lambda: _fetch(store, found, folder))
        run_on_local_rank_zero(lambda: _fetch(store, found, folder))
    return folder / CHECKPOINTS / found.name


@contextmanager
def _run_of(location: str | Path) -> Iterator[tuple[Store, str | None]]:
    """The store that a run's checkpoints are in, and the one that is named, if one is."""
    run = checked_location(location).rstrip("/")
    before, _, last = run.rpartition(f"/{CHECKPOINTS}/")
    name = last if before and NAME.fullmatch(last) else None
    store = open_store(before if name else run)
    try:
        yield store, name
    finally:
        store.close()


def _find(store: Store, name: str | None, location: str | Path) -> RemoteCheckpoint:
    found = newest_remote(store, only=name)
    if found is None:
        raise CheckpointError(f"{location}: no checkpoint of a run here; give its `save_remote`")
    return found
