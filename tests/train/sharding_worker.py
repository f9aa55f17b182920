"""Run by test_composer_model.py: sharded as a run shards it, a network computes in bf16 what it computes alone."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from composer.core import Precision
from composer.distributed import prepare_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from streaming_rwkv.data.batch import Batch
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.processes import end_with
from streaming_rwkv.train.composer_model import SHARDS, RWKV7ForTraining, sharding
from streaming_rwkv.train.microbatch import full_batch

VOCAB_SIZE = 40


def results(batch: Batch, *, sharded: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    network = RWKV7(RWKV7Config(vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=3))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model = RWKV7ForTraining(network, num_streams=1, flops_per_token=1)
    if sharded:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=(SHARDS,))
        with patch.object(prepare_distributed, "_validate_precision"):  # Composer has bf16 for GPUs alone
            prepare_distributed.parallelize_composer_model(model, None, sharding(mesh), precision=Precision.AMP_BF16)
        assert isinstance(network.blocks[0], FSDPModule)
    register_fsdp_forward_method(network, "step")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
        loss = model.loss(outputs, batch)
    loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in network.named_parameters()
        if p.grad is not None
    }
    with torch.autocast("cpu", torch.bfloat16):
        sampled = list(generate_tokens(network, [1, 2, 3], max_tokens=4, temperature=0))
    return outputs["nll"].detach(), gradients, sampled


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = full_batch(packs=2, pack_tokens=32, pieces_per_pack=3, device=torch.device("cpu"))
    for name in ("tokens", "targets"):
        batch[name] = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(len(name)))
    alone, together = (results(batch, sharded=sharded) for sharded in (False, True))
    assert torch.equal(alone[0], together[0])
    assert [name for name in alone[1] if not torch.equal(alone[1][name], together[1][name])] == []
    assert alone[2] == together[2]
    print(Path(__file__).name, "equal", flush=True)


end_with(main)
