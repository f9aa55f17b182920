"""Registration of an op of the layer with torch, and what the launches of its kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops.layer.dispatch import WIDTH_UNIT

LEAST_TILE, MOST_TILES = 16, 1024


def define_op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Register an op of ours: its kernel for both devices, and the shapes that torch asks for without data."""
    name = f"streaming_rwkv::{schema.partition('(')[0]}"

    def register(kernel: Callable[..., Any]) -> None:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, ("cpu", "cuda"))(kernel)
        torch.library.register_fake(name)(fake)

    return register


def tiles_of(tokens: int) -> tuple[int, int]:
    """Tokens of a tile and the number of tiles: many enough for a GPU, each long enough to be worth its sums."""
    tile = max(LEAST_TILE, -(-tokens // MOST_TILES))
    return tile, -(-tokens // tile)


def ready(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, and aligned for vector loads: a view into another tensor may begin anywhere."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def as_vector(x: Tensor) -> Tensor:
    """Return a parameter as kernels read it: flat, in float32."""
    return x.detach().reshape(-1).float()


def as_rows(parameters: Sequence[Tensor]) -> Tensor:
    """Return parameters of C numbers each as kernels read them: (len, C), in float32."""
    return torch.stack(list(parameters)).detach().view(len(parameters), -1).float()


def sum_tiles(partial: Tensor) -> Tensor:
    """(K, P, C) → (P, C), in the order of the tiles."""
    tiles, *shape = partial.shape
    total = partial.new_empty(shape)
    arguments = (tiles, total.numel(), partial, total)
    launch.launcher(partial.device)(launch.Kernel("sum_blocks", (), 0), -(-total.numel() // WIDTH_UNIT), arguments)
    return total


def weight_gradient(weight: Tensor, x: Tensor, dproduct: Tensor) -> Tensor:
    """Return the gradient of `weight` (out, in) in x @ weight.T, in its memory order: autograd copies any other."""
    rows, drows = x.flatten(0, -2), dproduct.flatten(0, -2)
    return drows.T @ rows if weight.is_contiguous() else (rows.T @ drows).T
