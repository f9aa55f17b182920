"""Reading Composer's checkpoints for their weights, without running what a pickle may bring.

Composer and torch's distributed checkpoints load their own files with a plain `pickle.load`; whoever can write such a
file runs code on the machine that reads it. Here every global that a pickle names must be on a list.
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

_NUMPY_RECONSTRUCT = np.empty(0).__reduce__()[0]

# What a Composer file holds beside tensors and plain values: times, versions, and NumPy's random state.
SAFE_GLOBALS: list[Any] = [datetime.timedelta, TorchVersion, _NUMPY_RECONSTRUCT, np.ndarray, np.dtype, UInt32DType]

_METADATA_GLOBALS = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "StorageMeta",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"global {module}.{name}")


class _Reader(FileSystemReader):
    """torch's reader reads the shards for tensors alone, and their `.metadata` with a plain `pickle.load`."""

    def read_metadata(self) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint that several processes wrote, put together; the optimizer's stay unread.

    Raises:
        pickle.UnpicklingError: the metadata name a global that no checkpoint needs.
    """
    prefix = "state.model."
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # It warns that one process alone is reading, which is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        load(tensors, storage_reader=_Reader(folder), no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
