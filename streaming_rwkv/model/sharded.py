"""Read weights from checkpoint files of torch and Composer without running code from their pickles.

Both load their own files with a plain `pickle.load`, so a file can run code on the machine that reads it. Here every
global that a pickle names must be on a list.
"""

from __future__ import annotations

import datetime
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.dtypes import UInt32DType
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.torch_version import TorchVersion

from streaming_rwkv.filesystem import is_plain_name
from streaming_rwkv.model.marked_files import check_files, read_files
from streaming_rwkv.outputs import MARK_NAME

INDEX_NAME = ".metadata"
LARGEST_INDEX_BYTES = 1 << 26  # that of a model of 3 billion parameters on 64 GPUs has a few million

# The contents of a Composer file beside tensors and plain values: times, versions, and NumPy's random state.
SAFE_GLOBALS: list[Any] = [
    datetime.timedelta,
    TorchVersion,
    np.empty(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    UInt32DType,
]

_INDEX_GLOBALS = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size"},  # and dtypes
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _INDEX_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint index needs")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """torch's reader of sharded checkpoints with a checked index, which torch would unpickle unchecked."""

    def read_metadata(self) -> Metadata:
        """Read the index.

        Raises:
            pickle.UnpicklingError: it names a global that no index needs.
            ValueError: it places a tensor outside the files of the folder.
        """
        with open(Path(self.path) / INDEX_NAME, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST_INDEX_BYTES:
                raise ValueError(f"{INDEX_NAME}: has {size:,} bytes, expected at most {LARGEST_INDEX_BYTES:,}")
            try:
                metadata = _IndexUnpickler(file).load()
            except (AttributeError, ImportError, LookupError, MemoryError, OverflowError, TypeError) as error:
                raise pickle.UnpicklingError(f"damaged ({type(error).__name__}: {error})") from None
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not the index of a checkpoint")
        _check_places(metadata, Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_places(metadata: Metadata, folder: Path) -> None:
    """Check that every piece of a tensor is within a file of the folder."""
    places = metadata.storage_data
    if not isinstance(places, dict):
        raise ValueError(f"{INDEX_NAME}: storage_data is a {type(places).__name__}, expected a mapping")
    sizes: dict[str, int] = {}
    for index, place in places.items():
        if not isinstance(place, _StorageInfo):
            raise ValueError(f"{INDEX_NAME}: the place of {index} is a {type(place).__name__}")
        name, offset, length = place.relative_path, place.offset, place.length
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"{INDEX_NAME}: names the file {name!r}, expected one in this folder")
        if name not in sizes:
            if not (folder / name).is_file():
                raise ValueError(f"the file {name!r} is missing")
            sizes[name] = (folder / name).stat().st_size
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise ValueError(f"{INDEX_NAME}: {length!r} bytes from {offset!r} on in {name}, expected whole numbers")
        if offset + length > sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, expected {offset + length}: it is cut off")


class ShardedWeights:
    """The model's tensors of a checkpoint, read one at a time; its files are compared with their hashes first.

    Raises:
        pickle.UnpicklingError: the index names a global that no checkpoint needs.
        ValueError: a file differs from the completion mark, or the checkpoint has no model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_hashes(folder)
        self._prefix, self._entries = _of_model(folder)
        self.shapes = {name.removeprefix(self._prefix): tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        key = self._prefix + name
        entry = self._entries[key]
        return _load(self.folder, {key: torch.empty(entry.size, dtype=entry.properties.dtype)})[key]


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """Return the model's tensors of a checkpoint written by any number of processes, without the optimizer's.

    The model is found by the one name that ends with `emb.weight`: `model.emb.weight` in this project's checkpoints,
    `state.model.…` in Composer's.

    Raises:
        pickle.UnpicklingError: the index names a global that no checkpoint needs.
        ValueError: a file differs from the completion mark, or the checkpoint has no such model.
    """
    _check_hashes(folder)
    prefix, of_model = _of_model(folder)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in of_model.items()}
    return {name.removeprefix(prefix): value for name, value in _load(folder, tensors).items()}


def _of_model(folder: Path) -> tuple[str, dict[str, TensorStorageMetadata]]:
    """Return the prefix of the model's tensors, and their entries in the index."""
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    prefixes = [name.removesuffix("emb.weight") for name in entries if name.endswith("emb.weight")]
    if len(prefixes) != 1:
        raise ValueError(f"no RWKV-7 model in it; found {', '.join(sorted(entries)[:3])}")
    of_model = {
        name: entry
        for name, entry in entries.items()
        if name.startswith(prefixes[0]) and isinstance(entry, TensorStorageMetadata)
    }
    needed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in of_model.values())
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if needed > 2 * stored + (1 << 20):
        raise ValueError(f"{INDEX_NAME}: has {needed} bytes of weights, the files have {stored}")
    return prefixes[0], of_model


def _load(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill `tensors` from a checkpoint's files."""
    with warnings.catch_warnings():
        # It warns that a single process reads, which is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            load(tensors, storage_reader=SafeReader(folder), no_dist=True)
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
