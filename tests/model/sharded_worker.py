"""One of two processes that train a sharded model for one step; started by test_sharding.py:

python sharded_worker.py FOLDER RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from streaming_rwkv.model.weights import read_model
from streaming_rwkv.processes import end_with


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = torch.load(folder / f"batch{rank}.pt")
    # FSDP2 asks for the mean over ranks; gloo, with torch 2.7, gives the sum and says nothing.
    one = torch.empty(1)
    dist.reduce_scatter_tensor(one, torch.ones(2), op=dist.ReduceOp.AVG)
    results = {"gradient_scale": one.item()}
    for name, policy in {
        "float32": MixedPrecisionPolicy(),
        "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }.items():
        model = read_model(folder / "model.pth", activation_checkpointing=True)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        register_fsdp_forward_method(model, "step")
        nll = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"], targets=batch["targets"])
        nll.sum().backward()
        gradients = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
        with torch.no_grad():
            logits, _ = model.step(torch.tensor([[1, 2, 3]]))
        results[name] = {"nll": nll.detach(), "gradients": gradients, "logits": logits}
    torch.save(results, folder / f"result{rank}.pt")


if __name__ == "__main__":
    end_with(lambda: main(Path(sys.argv[1]), int(sys.argv[2])))
