"""Boundaries of documents packed in one row."""

from __future__ import annotations

import torch
from torch import Tensor


def check_bounds(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Check shape and type, and the values where reading them costs nothing: on the CPU.

    Raises:
        ValueError: they are no row of int32, or do not rise from 0 to `tokens` or less.
    """
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"{op}: cu_seqlens has the shape {tuple(cu_seqlens.shape)}, expected (num_documents + 1,)")
    if cu_seqlens.dtype != torch.int32:  # kernels read nothing else
        raise ValueError(f"{op}: cu_seqlens is {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.numpy()
    if bounds[0] != 0 or bounds[-1] > tokens or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"{op}: cu_seqlens is {cu_seqlens.tolist()}, expected to rise from 0 to {tokens} or less")
