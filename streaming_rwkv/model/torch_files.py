"""Checks of what `torch.save` wrote, before torch loads it: memory stays in proportion to the file."""

from __future__ import annotations

import datetime
import io
import pickle
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from numpy.dtypes import UInt32DType
from torch.torch_version import TorchVersion

from streaming_rwkv.model.pickles import Check, Value, anything, check_pickle, latin1, small

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# The contents of a Composer file beside tensors and plain values: times, versions, and NumPy's random state.
SAFE_GLOBALS: list[Any] = [
    datetime.timedelta,
    TorchVersion,
    np.empty(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    UInt32DType,
]


def _empty(arguments: Sequence[Any]) -> None:
    """Allow the call by which pickles of NumPy make an array, which is empty at first."""
    shape = arguments[1]
    if not isinstance(shape, Value) or shape.members != [0]:
        raise ValueError("its pickle has an array that does not begin empty")


_CALLS: dict[str, Check] = {
    **{
        f"torch._utils._rebuild_{what}": anything
        for what in (
            "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "qtensor", "sparse_tensor",
            "meta_tensor_no_storage", "nested_tensor",
        )
    },
    **{f"numpy.{core}.multiarray._reconstruct": _empty for core in ("core", "_core")},  # the second since NumPy 2
    **dict.fromkeys(
        (
            "collections.OrderedDict", "torch.Size", "torch.device", "torch.serialization._get_layout",
            "torch.torch_version.TorchVersion", "datetime.timedelta", "numpy.dtype",
        ),
        small,
    ),
    "_codecs.encode": latin1,
}  # fmt: skip
# torch calls these too. They run no code, but make more than the file contains.
_NOT_IN_WEIGHTS = {
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytearray", "set", "complex")),
    "collections.Counter", "torch.Tensor",
}  # fmt: skip
_LEGACY_PICKLES = 5  # at its beginning: magic number, version, machine, the object, the keys of its storages


def _is_named(name: str) -> bool:
    """Return whether files of weights name an object beside those that they call: a type of numbers or of storages."""
    module, _, last = name.rpartition(".")
    if name in ("numpy.ndarray", "numpy.dtypes.UInt32DType"):
        return True
    if module in ("torch", "torch.cuda", "torch.storage") and last.endswith("Storage"):
        return True
    return module == "torch" and isinstance(getattr(torch, last, None), (torch.dtype, torch.layout, torch.qscheme))


def check_torch_file(file: IO[bytes]) -> bool:
    """Check a file, or a part of one, and return True for a zip archive, False for the legacy format.

    Raises:
        pickle.UnpicklingError: a pickle in it would run code.
        ValueError: a part of the archive is compressed, or a pickle makes more than it contains.
        RuntimeError, ValueError, …: damaged.
    """
    is_archive = zipfile.is_zipfile(file)
    if is_archive:
        _check_not_compressed(file)
    file.seek(0)
    if is_archive:
        # torch's own reader sees what torch will load; zipfile refuses archives that torch saved without checksums.
        _check_pickles(io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl")), count=1)
    else:
        _check_pickles(file, count=_LEGACY_PICKLES)
    file.seek(0)
    return is_archive


def _check_not_compressed(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{compressed[0]!r} in it is compressed, which torch never does")


def _check_pickles(stream: IO[bytes], *, count: int) -> None:
    for _ in range(count):
        try:
            check_pickle(stream, _CALLS, names=_is_named)
        except pickle.UnpicklingError as error:
            if str(error).rpartition(" ")[2] in _NOT_IN_WEIGHTS:
                raise ValueError(f"{error}, which is in no weights") from None
            raise
