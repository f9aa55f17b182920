"""The index of a sharded checkpoint, `.metadata`: a pickle of torch's classes, read without running code from it.

torch loads it with a plain `pickle.load`, and relies on what it says. Here every global that the pickle names must be
on a list, and every tensor must be stored whole, once, within the files beside it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from streaming_rwkv.filesystem import is_plain_name
from streaming_rwkv.model.pickles import Check, check_pickle, small, texts

INDEX_NAME = ".metadata"
LARGEST_INDEX_BYTES = 1 << 26  # that of a model of 3 billion parameters on 64 GPUs has a few million
_MOST_SIZE = 1 << 48
_MOST_DIMENSIONS = 8
_MOST_CELLS = 1 << 20  # of the grid that the pieces of a tensor make; one for each piece in what torch writes

_OF_METADATA = (
    "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
    "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_CALLS: dict[str, Check] = {
    **{f"torch.distributed.checkpoint.metadata.{name}": small for name in _OF_METADATA},
    **{f"pathlib.{name}": texts for name in ("Path", "PosixPath", "PurePosixPath")},
    **dict.fromkeys(
        (
            "collections.OrderedDict", "torch.Size", "torch.serialization._get_layout",
            "torch.distributed.checkpoint.filesystem._StorageInfo",
        ),
        small,
    ),
}  # fmt: skip

# Of unpickling what is damaged, and of objects that lack attributes, or have others' values in them.
_DAMAGED = (
    AttributeError, ImportError, LookupError, MemoryError, OverflowError, RecursionError, RuntimeError, TypeError
)  # fmt: skip


def _is_dtype(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)


def read_index(folder: Path) -> Metadata:
    """Read the index of a checkpoint.

    Raises:
        pickle.UnpicklingError: it names a global that no index needs, or is damaged.
        ValueError: a tensor is not stored whole, or outside the files of the folder.
        EOFError, OSError: it is cut off, or cannot be read.
    """
    with open(folder / INDEX_NAME, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST_INDEX_BYTES:
            raise ValueError(f"{INDEX_NAME}: has {size:,} bytes, expected at most {LARGEST_INDEX_BYTES:,}")
        content = file.read(LARGEST_INDEX_BYTES)
    try:
        check_pickle(io.BytesIO(content), _CALLS, names=_is_dtype)
        metadata = pickle.loads(content)
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not the index of a checkpoint")
        if metadata.storage_meta is not None and not isinstance(metadata.storage_meta, StorageMeta):
            raise TypeError(f"storage_meta is a {type(metadata.storage_meta).__name__}")
        _check_places(metadata.storage_data, folder)
        _check_entries(metadata.state_dict_metadata, metadata.storage_data)
    except _DAMAGED as error:
        raise pickle.UnpicklingError(f"damaged ({type(error).__name__}: {error})") from None
    return metadata


def _check_places(places: Any, folder: Path) -> None:
    """Check that every piece of a tensor is within a file of the folder."""
    if not isinstance(places, dict):
        raise TypeError(f"storage_data is a {type(places).__name__}, expected a mapping")
    sizes: dict[str, int] = {}
    for index, place in places.items():
        if type(index) is not MetadataIndex or type(place) is not _StorageInfo:
            raise TypeError(f"storage_data maps a {type(index).__name__} to a {type(place).__name__}")
        name, offset, length = place.relative_path, place.offset, place.length
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"{INDEX_NAME}: names the file {name!r}, expected one in this folder")
        if getattr(place, "transform_descriptors", None) is not None:  # since torch 2.7
            raise ValueError(f"{INDEX_NAME}: {name} is transformed (compressed, perhaps); save the checkpoint without")
        if name not in sizes:
            if not (folder / name).is_file():
                raise ValueError(f"the file {name!r} is missing")
            sizes[name] = (folder / name).stat().st_size
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise ValueError(f"{INDEX_NAME}: {length!r} bytes from {offset!r} on in {name}, expected whole numbers")
        if offset + length > sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, expected {offset + length}: it is cut off")


def _check_entries(entries: Any, places: Mapping[MetadataIndex, Any]) -> None:
    """Check that every tensor is stored whole and once."""
    if not isinstance(entries, dict):
        raise TypeError(f"state_dict_metadata is a {type(entries).__name__}, expected a mapping")
    for name, entry in entries.items():
        if type(name) is not str:
            raise TypeError(f"state_dict_metadata has the key {name!r}, expected text")
        if type(entry) is BytesStorageMetadata:
            continue
        if type(entry) is not TensorStorageMetadata or not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{name} is a {type(entry).__name__}, expected a tensor with its dtype")
        size = _numbers(entry.size, name)
        pieces = [(_numbers(piece.offsets, name), _numbers(piece.sizes, name)) for piece in entry.chunks]
        if not _are_whole(size, pieces):
            raise ValueError(f"{INDEX_NAME}: {name} is {size}, of which its {len(pieces)} pieces are not exactly all")
        for offsets, sizes in pieces:
            if math.prod(sizes) and MetadataIndex(name, offsets) not in places:
                raise ValueError(f"{INDEX_NAME}: does not say where the piece of {name} at {offsets} is stored")


def _numbers(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or len(values) > _MOST_DIMENSIONS:
        raise TypeError(f"a size of {name} is a {type(values).__name__}, expected at most {_MOST_DIMENSIONS} numbers")
    if not all(type(value) is int and 0 <= value <= _MOST_SIZE for value in values):
        raise ValueError(f"{INDEX_NAME}: {name} has the size or place {tuple(values)}, expected numbers from 0 on")
    return tuple(values)


def _are_whole(size: tuple[int, ...], pieces: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Return whether pieces, each as offsets and sizes, cover a tensor exactly once."""
    if any(not len(offsets) == len(sizes) == len(size) for offsets, sizes in pieces):
        return False
    boxes = [
        tuple(zip(offsets, map(sum, zip(offsets, sizes, strict=True)), strict=True))
        for offsets, sizes in pieces
        if math.prod(sizes)
    ]
    # The bounds of all pieces divide the tensor into cells; each must be in one piece.
    bounds = [
        sorted({0, length, *itertools.chain.from_iterable(box[axis] for box in boxes)})
        for axis, length in enumerate(size)
    ]
    if any(ends[-1] > length for ends, length in zip(bounds, size, strict=True)):
        return False
    cells = [len(ends) - 1 for ends in bounds]
    if math.prod(cells) > _MOST_CELLS:
        return False
    places = [{bound: number for number, bound in enumerate(ends)} for ends in bounds]
    covered = np.zeros(cells, np.int32)
    for box in boxes:
        covered[tuple(slice(place[begin], place[end]) for place, (begin, end) in zip(places, box, strict=True))] += 1
    return bool((covered == 1).all())
