"""Uploads of a run's save folder to object storage: everything that an empty machine needs to resume the run.

    {remote}/checkpoints/step-00000500/…              as in the save folder; each rank uploads the files that it wrote
    {remote}/checkpoints/step-00000500/uploading.0    written by rank 0 before its files; removed after the mark
    {remote}/checkpoints/step-00000500/complete.json  written last: a checkpoint that has it is complete
    {remote}/writer.json                              the run that may write here: the one that started last
    {remote}/{config.yaml, metrics.jsonl, samples.jsonl, …, tokenizer/, tensorboard/}
                                                      with each checkpoint, and at the end of the run

Files are uploaded in a thread while training continues, one checkpoint at a time. The next checkpoint is not written
before the previous one is uploaded, so a slow network does not pile up files. The thread calls no collective. Ranks
exchange their state in the reduction that ends each step (`train.callbacks.Checkpointer`), and enter the next stage at
the same step:

    idle ─ begin ─▶ files ─ no rank is busy: advance ─▶ sealing (rank 0: logs, mark, pruning) ─ advance ─▶ idle
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from streaming_rwkv.config import UserError
from streaming_rwkv.distributed import all_gather_object, broadcast_object, is_rank_zero, rank, run_on_rank_zero
from streaming_rwkv.filesystem import is_temporary, read_regular_file
from streaming_rwkv.model.marked_files import read_mark_bytes
from streaming_rwkv.outputs import CHECKPOINTS, LARGEST_WRITER_BYTES, LOGS, MARK_NAME, WRITER
from streaming_rwkv.storage import ObjectMissing, Store
from streaming_rwkv.train.checkpoints.local import wrote
from streaming_rwkv.train.checkpoints.record import LARGEST_LOG_BYTES, read_mark
from streaming_rwkv.train.checkpoints.remote import UPLOADING, RemoteCheckpoints
from streaming_rwkv.train.checkpoints.selection import prune

POLL_SECONDS = 0.1


class MirrorError(UserError):
    """The run's folder in object storage cannot be written, or belongs to another run."""


class Mirror:
    """This rank's uploads of a run's folder to a store. All ranks call the methods together."""

    def __init__(self, store: Store, folder: Path, *, keep: int, keep_every: int | None = None) -> None:
        """Connect the save folder with the store; nothing is sent yet.

        Args:
            store: the run's folder; its timeout limits how long an upload may make no progress before the run stops.
            folder: the save folder, which is only read.
            keep: the number of checkpoints that stay in the store, the newest ones; 0 keeps all.
            keep_every: the checkpoints of steps that are multiples of it stay too.
        """
        self.store = store
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self._stage: Literal["idle", "files", "sealing"] = "idle"
        self._checkpoint = Path()
        self._sent: dict[str, tuple[int, int]] = {}  # logs by name: time and size when uploaded
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._writer: bytes | None = None  # as this run wrote it

    @property
    def busy(self) -> bool:
        """Return True while this rank's thread works."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Return True if this rank's upload has failed."""
        return self._problem is not None and not self.busy

    def take_over(self) -> None:
        """Claim the store for this run. Another run that still writes there stops at its next upload.

        A scheduler that restarts a job cannot always tell that the first one is dead. The run that started last
        continues, so nobody has to remove the claim of a machine that is lost.
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
        """Start to upload a complete local checkpoint; `all_on_rank_zero` if a run of another world size wrote it."""
        assert self._stage == "idle", "the previous checkpoint is not uploaded yet"
        names = sorted(read_mark(checkpoint).files)
        mine = [name for name in names if (is_rank_zero() if all_on_rank_zero else wrote(name))]
        self._stage, self._checkpoint = "files", checkpoint
        if mine:
            self._run(lambda: self._send_files(checkpoint, mine))

    def advance(self) -> None:
        """Enter the next stage; for use when no rank is busy and none has failed."""
        match self._stage:
            case "files":
                self._stage = "sealing"
                if is_rank_zero():
                    checkpoint = self._checkpoint
                    self._run(lambda: self._seal(checkpoint))
            case "sealing":
                self._stage = "idle"

    def settle(self) -> bool:
        """Wait until the checkpoint is uploaded; return False if a rank's upload failed."""
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
        """Wait until the checkpoint is uploaded, then upload the logs to their end.

        Raises:
            MirrorError: an upload failed.
        """
        if not self.settle():
            raise self.error()
        self.send_logs()
        self.store.close()

    def send_logs(self) -> None:
        """Upload the logs, also before the first step: a store that cannot be written stops the run at once."""
        run_on_rank_zero(self._send_logs)

    def error(self) -> MirrorError:
        """Return the error of the rank whose upload failed."""
        problem = next(text for text in all_gather_object(self._problem) if text is not None)
        return MirrorError(
            f"{self._checkpoint.name} could not be uploaded: {problem}. Nothing is lost on this machine: the newest "
            f"checkpoint is in {self.folder / CHECKPOINTS}; fix the cause, and the same command resumes from there"
        )

    def _run(self, work: Callable[[], None]) -> None:
        def target() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - `error` raises it, in the main thread
                self._problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

        # A daemon, so that a run that stops for another reason does not wait for its uploads.
        self._thread = threading.Thread(target=target, name="mirror", daemon=True)
        self._thread.start()

    def _check_writer(self) -> None:
        if self._writer is None:
            return
        try:
            found = self.store.get_bytes(WRITER, most=LARGEST_WRITER_BYTES)
        except ObjectMissing:  # removed by hand: no other run claims the place
            return
        if found != self._writer:
            raise MirrorError(
                f"{self.store.url(WRITER)}: another run has taken over this place: {found.decode(errors='replace')}; "
                "only one run may write here; stop the other, or give this one its own `save_remote`"
            )

    def _send_files(self, checkpoint: Path, names: Sequence[str]) -> None:
        self._check_writer()
        folder = f"{CHECKPOINTS}/{checkpoint.name}"
        files = read_mark(checkpoint).files
        self.store.put_bytes(b"begun\n", f"{folder}/{UPLOADING}{rank()}")
        # An earlier start may have uploaded this step: a mark must never cover a mixture of both.
        self.store.delete([f"{folder}/{MARK_NAME}"])
        for name in names:
            self._check_writer()
            self.store.put_file(checkpoint / name, f"{folder}/{name}", sha256=files[name].sha256)

    def _seal(self, checkpoint: Path) -> None:
        self._send_logs()
        folder = f"{CHECKPOINTS}/{checkpoint.name}/"
        self._check_writer()
        self.store.put_bytes(read_mark_bytes(checkpoint), folder + MARK_NAME)
        self.store.delete(name for name in self.store.list(folder) if name.startswith(folder + UPLOADING))
        step = read_mark(checkpoint).step
        prune(RemoteCheckpoints(self.store), keep=self.keep, last_step=step, keep_every=self.keep_every)

    def _send_logs(self) -> None:
        self._check_writer()
        for path in _log_files(self.folder):
            status = path.lstat()
            name, state = path.relative_to(self.folder).as_posix(), (status.st_mtime_ns, status.st_size)
            if self._sent.get(name) != state:
                content = read_regular_file(path, most=LARGEST_LOG_BYTES, follow=False)
                self.store.put_bytes(content, name)  # a snapshot: training continues to write
                self._sent[name] = state


def _log_files(folder: Path) -> list[Path]:
    """Return the log files of a run, without links: a folder that was copied from elsewhere may link to anything."""
    below = [path for name in LOGS if not (folder / name).is_symlink() for path in (folder / name).rglob("*")]
    found = [*(folder / name for name in LOGS), *below]
    return sorted(path for path in found if path.is_file() and not path.is_symlink() and not is_temporary(path))
