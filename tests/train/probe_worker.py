"""Run by test_probing.py in two processes over gloo: what runs out of memory on one rank is too large for both."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from composer.core import Precision
from torch.nn.modules.module import register_module_forward_hook

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.processes import end_with
from streaming_rwkv.train.composer_model import build_mesh
from streaming_rwkv.train.microbatch import largest_that_fits, probe_microbatch


def main(limit: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    device = torch.device("cpu")
    passes: list[int] = []

    def out_of_memory(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, RWKV7):
            passes.append(args[0].shape[1])
            if args[0].shape[1] > limit:
                raise torch.OutOfMemoryError("injected")

    mesh = build_mesh(1, device="cpu", timeout_seconds=60)
    hook = register_module_forward_hook(out_of_memory)
    config = RWKV7Config(vocab_size=20, hidden_size=64, num_layers=2)
    found = probe_microbatch(
        config, packs=8, pack_tokens=16, pieces_per_pack=3, precision=Precision.FP32, device=device, mesh=mesh
    )
    hook.remove()

    def on_one_rank_alone(packs: int) -> None:
        if dist.get_rank() == 1 and packs > 3:
            raise torch.OutOfMemoryError("injected")

    agreed = largest_that_fits(12, trial=on_one_rank_alone, device=device)
    if dist.get_rank() == 0:
        print(found, passes, agreed, flush=True)
    dist.barrier()


end_with(lambda: main(int(sys.argv[1])))
