"""A run's checkpoints in object storage.

A checkpoint's folder without a mark is an interrupted upload if it has an `uploading.…`, and damage if it has not. A
mark whose files are not all there is damage. Where there is nothing but damage, a person has to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from streaming_rwkv.model.marked_files import LARGEST_MARK_BYTES, CheckpointError
from streaming_rwkv.outputs import CHECKPOINTS, MARK_NAME
from streaming_rwkv.storage import Store
from streaming_rwkv.train.checkpoints.record import (
    CompletionMark,
    check_step,
    parse_mark,
    step_name,
    step_of_name,
)
from streaming_rwkv.train.checkpoints.selection import newest

UPLOADING = "uploading."
"""Begins the name of the object that each rank writes before a checkpoint's files."""


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpoint:
    """A complete checkpoint in object storage."""

    name: str
    content: bytes
    """The mark, as it is stored."""
    mark: CompletionMark

    @property
    def step(self) -> int:
        return self.mark.step


class RemoteCheckpoints:
    """The checkpoints in a store, as listed when first asked: a `CheckpointPlace`."""

    remedy = "restore one, or give the run another `save_remote` to start it again from its beginning"

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def location(self) -> str:
        return self.store.url(CHECKPOINTS)

    @cached_property
    def _files(self) -> dict[int, dict[str, int]]:
        """Bytes by file, by step."""
        listed: dict[int, dict[str, int]] = {}
        for key, size in self.store.list(f"{CHECKPOINTS}/").items():
            _, _, below = key.partition("/")
            name, _, file = below.partition("/")
            if (step := step_of_name(name)) is not None:
                listed.setdefault(step, {})[file] = size
        return listed

    def steps(self) -> list[int]:
        return list(self._files)

    def has_mark(self, step: int) -> bool:
        return MARK_NAME in self._files[step]

    def is_interrupted(self, step: int) -> bool:
        return not self.has_mark(step) and any(file.startswith(UPLOADING) for file in self._files[step])

    def find(self, step: int) -> RemoteCheckpoint:
        name, files = step_name(step), self._files.get(step, {})
        if MARK_NAME not in files:
            raise CheckpointError(f"no completion mark ({MARK_NAME})")
        content = self.store.get_bytes(f"{CHECKPOINTS}/{name}/{MARK_NAME}", most=LARGEST_MARK_BYTES)
        mark = parse_mark(content, where=MARK_NAME)
        check_step(mark, step)
        for file, record in mark.files.items():
            if files.get(file) != record.bytes:
                raise CheckpointError(f"{file} has {files.get(file, 'no')} bytes instead of {record.bytes}")
        return RemoteCheckpoint(name=name, content=content, mark=mark)

    def remove(self, step: int) -> None:
        name = step_name(step)
        # The mark first: a kill in between must not leave a checkpoint that looks complete.
        self.store.delete([f"{CHECKPOINTS}/{name}/{MARK_NAME}"])
        self.store.delete(f"{CHECKPOINTS}/{name}/{file}" for file in self._files[step])


def newest_remote(store: Store) -> RemoteCheckpoint | None:
    """Return the newest complete checkpoint in a store: see `selection.newest`.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
        StorageError: the store cannot be read.
    """
    return newest(RemoteCheckpoints(store))
