"""Ragged arrays: runs of values of different lengths in one flat array."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


def gather(values: NDArray[T], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[T]:
    """Concatenate `values[start : start + length]` of all runs, which may overlap and be in any order."""
    if len(starts):  # adjacent runs are joined: a run costs as much time as a thousand bytes
        begins = np.concatenate([[True], starts[1:] != starts[:-1] + lengths[:-1]])
        starts, lengths = starts[begins], np.add.reduceat(lengths, np.nonzero(begins)[0])
    # Through buffers: pa.array() and to_numpy() would import pandas, which takes half a second per process.
    child = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])
    buffers = [None, pa.py_buffer(np.ascontiguousarray(starts)), pa.py_buffer(np.ascontiguousarray(lengths))]
    views = pa.Array.from_buffers(pa.large_list_view(child.type), len(starts), buffers, children=[child])
    flat = views.flatten()
    return np.frombuffer(flat.buffers()[1], values.dtype, len(flat), offset=flat.offset * values.itemsize)
