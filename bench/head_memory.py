"""Peak memory of one training step with the logits made whole, and by chunks inside the network's forward.

    python bench/head_memory.py --tokens 2048 --layers 0     # head and loss of a 0.4B model at 128 k words, alone
    python bench/head_memory.py --tokens 1024                # the whole model

Each form runs in a process of its own: forward and backward in float32 with activation checkpointing, on weights that
do not matter. The figure is the process's peak resident size, and its distance from the size of weights and gradients.
The C library is told to return freed tensors at once; otherwise it would keep about a gigabyte that nothing uses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date

import torch
import torch.nn.functional as F
from torch import nn

from streaming_rwkv.model.head import Head
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config

GB = 1e9


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(form: str, *, tokens: int, layers: int, vocab_size: int, chunk_tokens: int) -> dict[str, float]:
    preset = RWKV7Config.model_validate({"preset": "0.4B", "vocab_size": vocab_size})
    config = preset.model_copy(
        update={"num_layers": max(1, layers), "activation_checkpointing": True, "loss_chunk_tokens": chunk_tokens}
    )
    imports = peak_bytes()
    model: nn.Module = RWKV7(config) if layers else Head(config.hidden_size, vocab_size, chunk_tokens=chunk_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
            parameter.grad = torch.full_like(parameter, 0)
    weights_and_gradients = sum(2 * parameter.nbytes for parameter in model.parameters())
    ids = torch.arange(tokens + 1).remainder(vocab_size).unsqueeze(0)
    targets = ids[:, 1:]
    x = ids[:, :-1] if layers else torch.ones(1, tokens, config.hidden_size, requires_grad=True)
    start = time.monotonic()
    if form == "whole":
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (loss + 0.5 * 1e-4 * (logits.amax(-1) ** 2).mean()).backward()
    else:
        (model(x, targets=targets).sum() / tokens).backward()
    return {
        "seconds": time.monotonic() - start,
        "peak": peak_bytes(),
        "above": peak_bytes() - imports - weights_and_gradients,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--form", choices=("whole", "chunks"), help="measure this one and print JSON")
    options = parser.parse_args()
    shape = {key: value for key, value in vars(options).items() if key != "form"}
    if options.form:
        print(json.dumps(measure(options.form, **shape)))
        return
    print(f"{date.today()}, CPU, {shape}")
    for form in ("whole", "chunks"):
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        result = json.loads(output.stdout)
        print(
            f"{form:7} peak {result['peak'] / GB:6.2f} GB, {result['above'] / GB:6.2f} GB above weights and gradients, "
            f"{result['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
