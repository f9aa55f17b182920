"""Read weights from sharded checkpoints of torch and Composer, without running code from their pickles."""

from __future__ import annotations

import errno
import io
import math
import os
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from streaming_rwkv.model.marked_files import check_files, read_files
from streaming_rwkv.model.sharded_index import INDEX_NAME, read_index
from streaming_rwkv.model.torch_files import WEIGHT_DTYPES, check_torch_file
from streaming_rwkv.outputs import MARK_NAME


class SafeReader(FileSystemReader):
    """torch's reader of sharded checkpoints, which checks what torch would rely on before it is used."""

    _index: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Return the index, which is read once: see `read_index`."""
        self._index = self._index or read_index(Path(self.path))
        self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the pieces of a plan, each of which is a file of torch's within one of the checkpoint's.

        Raises:
            ValueError: a piece is no tensor, or would become much larger in memory than it is.
        """
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            if item.type != LoadItemType.TENSOR:  # torch would unpickle it
                raise ValueError(f"{item.storage_index.fqn} is no tensor")
            with open(Path(self.path) / place.relative_path, "rb") as file:
                check_torch_file(io.BufferedReader(_Part(file, offset=place.offset, length=place.length)))
        return super().read_data(plan, planner)


class _Part(io.RawIOBase):
    """A part of a file as a file of its own; torch's own view of one takes a place from the end for another."""

    def __init__(self, file: IO[bytes], *, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class ShardedWeights:
    """The model's tensors of a checkpoint, read one at a time; its files are compared with their hashes first.

    Raises:
        pickle.UnpicklingError: the index names a global that no checkpoint needs.
        ValueError: a file differs from the completion mark, or the checkpoint has no model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_hashes(folder)
        self._reader = SafeReader(folder)
        self._prefix, self._entries = _of_model(self._reader)
        self.shapes = {name.removeprefix(self._prefix): tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        key = self._prefix + name
        entry = self._entries[key]
        return _load(self._reader, {key: torch.empty(entry.size, dtype=entry.properties.dtype)})[key]


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """Return the model's tensors of a checkpoint written by any number of processes, without the optimizer's.

    The model is found by the one name that ends with `emb.weight`: `model.emb.weight` in this project's checkpoints,
    `state.model.…` in Composer's.

    Raises:
        pickle.UnpicklingError: the index names a global that no checkpoint needs.
        ValueError: a file differs from the completion mark, or the checkpoint has no such model.
    """
    _check_hashes(folder)
    reader = SafeReader(folder)
    prefix, of_model = _of_model(reader)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in of_model.items()}
    return {name.removeprefix(prefix): value for name, value in _load(reader, tensors).items()}


def _of_model(reader: SafeReader) -> tuple[str, dict[str, TensorStorageMetadata]]:
    """Return the prefix of the model's tensors, and their entries in the index."""
    entries = reader.read_metadata().state_dict_metadata
    prefixes = [name.removesuffix("emb.weight") for name in entries if name.endswith("emb.weight")]
    if len(prefixes) != 1:
        raise ValueError(f"no RWKV-7 model in it; found {', '.join(sorted(entries)[:3])}")
    of_model = {
        name: entry
        for name, entry in entries.items()
        if name.startswith(prefixes[0]) and isinstance(entry, TensorStorageMetadata)
    }
    for name, entry in of_model.items():
        if entry.properties.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name} is {entry.properties.dtype}, expected float32, bfloat16 or float16 weights")
    needed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in of_model.values())
    stored = sum(file.stat().st_size for file in Path(reader.path).iterdir() if file.is_file())
    if needed > 2 * stored + (1 << 20):
        raise ValueError(f"{INDEX_NAME}: has {needed} bytes of weights, the files have {stored}")
    return prefixes[0], of_model


def _load(reader: SafeReader, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill `tensors` from a checkpoint's files."""
    with warnings.catch_warnings():
        # It warns that a single process reads, which is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException of torch
            cause, reason = cause_of(error)
            if isinstance(cause, PermissionError):
                raise cause from None
            raise ValueError(reason) from None
    return tensors


def cause_of(error: CheckpointException) -> tuple[BaseException, str]:
    """Return the first failure of those that torch has collected, and its name and text."""
    cause = next(iter(error.failures.values()), (error, None))[0]
    return cause, f"{type(cause).__name__}: {without_advice(str(cause))}"


def without_advice(text: str) -> str:
    """Return the first line of the problem in torch's text, without its advice to run the code that a file brings."""
    line = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    return "its content is no pickle of weights" if "weights_only" in line else line


def _check_hashes(folder: Path) -> None:
    if (folder / MARK_NAME).is_symlink() or (folder / MARK_NAME).exists():
        check_files(folder, read_files(folder))
