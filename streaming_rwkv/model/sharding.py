"""Weights that FSDP2 has sharded."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def release_weights(model: nn.Module) -> None:
    """Shard the weights again that a forward pass without a backward pass leaves gathered, which are the root's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
