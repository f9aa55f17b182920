"""Run by test_time_mixing.py in two processes: a sharded block has the gradients of a whole one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from streaming_rwkv.processes import end_with


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("blocks", Path(__file__).with_name("test_time_mixing.py"))
    assert spec is not None
    assert spec.loader is not None
    blocks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(blocks)

    x = torch.randn(2, 1, 50, 32, generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 17, 48], dtype=torch.int32)
    whole, sharded = blocks.Block(), blocks.Block()
    fully_shard(sharded)
    sharded(x[dist.get_rank()], cu_seqlens).square().sum().backward()
    for rank in range(2):
        whole(x[rank], cu_seqlens).square().sum().backward()
    for found, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(found.grad, DTensor)
        assert expected.grad is not None
        gradient = found.grad.full_tensor()
        # The sum or, as NCCL has it, the mean over processes: whether gloo divides depends on torch's version.
        scale = expected.grad.norm() / gradient.norm()
        assert min(abs(scale - 1), abs(scale - 2)) < 1e-5
        torch.testing.assert_close(gradient * scale, expected.grad, rtol=1e-4, atol=1e-3)
    print("gradients equal", flush=True)


end_with(main)
