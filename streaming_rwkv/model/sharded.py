"""Reading torch's and Composer's checkpoint files for their weights, without running what a pickle may bring.

Both load their own files with a plain `pickle.load`; whoever can write such a file runs code on the machine that
reads it. Here every global that a pickle names must be on a list.
"""

from __future__ import annotations

import datetime
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.dtypes import UInt32DType
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.torch_version import TorchVersion

from streaming_rwkv.model.completion_mark import MARK_NAME, check_files, read_mark

INDEX_NAME = ".metadata"

# What a Composer file holds beside tensors and plain values: times, versions, and NumPy's random state.
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
    """torch's reader of sharded checkpoints, but for their index, which torch unpickles without any check."""

    def read_metadata(self) -> Metadata:
        """Raises `pickle.UnpicklingError` where the index names a global that it does not need."""
        with open(Path(self.path) / INDEX_NAME, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not the index of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint that one or several processes wrote; the optimizer's stay unread.

    They are found by the one name that ends with `emb.weight`: `model.emb.weight` in our own checkpoints,
    `state.model.…` in Composer's.

    Raises:
        pickle.UnpicklingError: the index names a global that no checkpoint needs.
        ValueError: a file is not what the completion mark says, or there is no such model in it.
    """
    _check_hashes(folder)
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    prefixes = [name.removesuffix("emb.weight") for name in entries if name.endswith("emb.weight")]
    if len(prefixes) != 1:
        raise ValueError(f"no RWKV-7 model in it; found {', '.join(sorted(entries)[:3])}")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefixes[0]) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # It warns that one process alone is reading, which is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    return {name.removeprefix(prefixes[0]): value for name, value in tensors.items()}


def _check_hashes(folder: Path) -> None:
    if (folder / MARK_NAME).is_symlink() or (folder / MARK_NAME).exists():
        check_files(folder, read_mark(folder)["files"])
