"""Run by test_fused.py in two processes: a network sharded by blocks has the gradients of a whole one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.processes import end_with


def network() -> RWKV7:
    found = RWKV7(RWKV7Config(hidden_size=128, num_layers=2, vocab_size=50))
    initialize(found, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    whole, sharded = network(), network()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    ids = torch.randint(50, (2, 1, 40), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 17, 38], dtype=torch.int32)

    def loss(model: RWKV7, row: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            nll: torch.Tensor = model(ids[row], cu_seqlens=cu_seqlens, targets=ids[row])
        return nll.sum()

    loss(sharded, dist.get_rank()).backward()
    for row in range(2):
        loss(whole, row).backward()
    for found, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(found.grad, DTensor)
        assert expected.grad is not None
        gradient = found.grad.full_tensor()
        # The sum or the mean over processes: whether gloo divides depends on torch's version.
        scale = expected.grad.norm() / gradient.norm()
        assert min(abs(scale - 1), abs(scale - 2)) < 1e-5
        torch.testing.assert_close(gradient * scale, expected.grad, rtol=1e-4, atol=1e-4)
    print("gradients equal", flush=True)


end_with(main)
