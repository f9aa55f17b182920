"""Checks of what `torch.save` wrote, before torch loads it: memory stays in proportion to the file."""

from __future__ import annotations

import datetime
import io
import pickle
import pickletools
import zipfile
from typing import IO, Any

import numpy as np
import torch
from numpy.dtypes import UInt32DType
from torch.torch_version import TorchVersion

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Array(np.ndarray):
    """What a pickle's `numpy.ndarray` becomes: an array that is filled from bytes in the file, and nothing else."""

    def __new__(cls, *_: object, **__: object) -> _Array:
        raise pickle.UnpicklingError("an array in it is not made of what it contains")


def _reconstruct(*_: object) -> _Array:
    """Return an empty array, to be filled; a pickle may ask NumPy's function of this name for one of any size."""
    return np.ndarray.__new__(_Array, (0,), np.uint8)


# The contents of a Composer file beside tensors and plain values: times, versions, and NumPy's random state.
SAFE_GLOBALS: list[Any] = [
    datetime.timedelta,
    TorchVersion,
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),  # since NumPy 2
    (_Array, "numpy.ndarray"),
    np.dtype,
    UInt32DType,
]

_LEGACY_PICKLES = 5  # at its beginning: magic number, version, machine, the object, the keys of its storages


def check_torch_file(file: IO[bytes]) -> bool:
    """Check a file, or a part of one, and return True for a zip archive, False for the legacy format.

    Raises:
        ValueError: a part of the archive is compressed, or a pickle asks for a bytearray.
        RuntimeError, ValueError, …: damaged.
    """
    is_archive = zipfile.is_zipfile(file)
    if is_archive:
        _check_not_compressed(file)
    file.seek(0)
    if is_archive:
        # torch's own reader sees what torch will load; zipfile refuses archives that torch saved without checksums.
        _check_no_bytearray(io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl")), pickles=1)
    else:
        _check_no_bytearray(file, pickles=_LEGACY_PICKLES)
    file.seek(0)
    return is_archive


def _check_not_compressed(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{compressed[0]!r} in it is compressed, which torch never does")


def _check_no_bytearray(stream: IO[bytes], *, pickles: int) -> None:
    """Refuse a bytearray, which torch would make of any size; it is in no weights."""
    for _ in range(pickles):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                raise ValueError("it asks for a bytearray, which is in no weights")
