"""Check a layer's fused ops on a GPU against their definitions, then print each kernel's time beside its byte floor.

    python -m bench.gpu_layer [--hidden-size 768] [--tokens 32768] [--bandwidth 3.35e12] [--device cuda]

Every op's outputs and gradients must be within bounds of the definition in float64 before anything is timed. The floor
of a kernel is the tensors it reads and writes, each once, at `--bandwidth` bytes a second: what the data sheet says of
the memory. bfloat16 with a float32 residual stream, as under autocast. `--device cpu` shows that the script runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops.testing import errors
from tests.ops import layer_kernels as kernels

OP = torch.ops.streaming_rwkv
REPEATS = 20


def check(device: torch.device) -> None:
    """Exit if an op is out of bounds."""
    cases = {
        "six mixes": kernels.norm_mix_case([5, 1, 0, 17, 300], width=768, padding=3),
        "one mix": kernels.norm_mix_case([5, 1, 0, 17, 300], width=2048, mixes=1),
        "rows": kernels.norm_mix_case([40], rows=3, width=320),
        "inputs of wkv7": kernels.wkv7_inputs_case(300, width=768),
        "output of wkv7": kernels.wkv7_output_case(300, width=2048),
        "ReLU²": kernels.relu_squared_case(300, width=3072),
    }
    for name, case in cases.items():
        on_device = case._replace(
            inputs={key: x.to(device) for key, x in case.inputs.items()},
            gradients=[x.to(device) for x in case.gradients],
        )
        exact = kernels.run(case, torch.float64)
        found = errors({key: x.cpu() for key, x in kernels.run(on_device, torch.float32).items()}, exact)
        worst = max(found, key=lambda key: found[key])
        print(f"{name:16} float32: worst error {found[worst]:.1e}, {worst}")
        # Not below 1e-5: TF32 is off, but a library's products sum in its own order.
        if not all(error <= 1e-5 for error in found.values()):
            sys.exit(f"{name}: {found}; not timed")


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return sorted(times)[REPEATS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--bandwidth", type=float, default=3.35e12)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    check(device)

    width, tokens = options.hidden_size, options.tokens
    shape = (1, tokens, width)
    cu_seqlens = torch.arange(0, tokens + 1, min(tokens, 2048), dtype=torch.int32, device=device)

    def narrow(*size: int) -> Tensor:
        return torch.randn(*size, device=device).bfloat16()

    x, branch, last_stats = torch.randn(shape, device=device), narrow(*shape), torch.ones(tokens, 2, device=device)
    vector = torch.ones(width, device=device)
    calls: dict[str, Callable[[], object]] = {}
    for mixes in (6, 1):
        vectors = (vector, vector, torch.rand(mixes, width, device=device), None, cu_seqlens)
        dmixed = [narrow(*shape) for _ in range(mixes)]
        calls[f"norm_mix {mixes}"] = lambda v=vectors: OP.norm_mix(x, branch, *v, 1e-5, torch.bfloat16)
        calls[f"norm_mix_backward {mixes}"] = lambda v=vectors, d=dmixed: OP.norm_mix_backward(
            x, last_stats, *v, x, d, None, True
        )
    six, hidden = [narrow(*shape) for _ in range(6)], narrow(1, tokens, 4 * width)
    calls["wkv7_inputs"] = lambda: OP.wkv7_inputs(*six, *[vector] * 5)
    three = [narrow(*shape) for _ in range(3)]
    calls["wkv7_inputs_backward"] = lambda: OP.wkv7_inputs_backward_(*three, *six[:3], [vector] * 5, *six[:5])
    calls["wkv7_output"] = lambda: OP.wkv7_output(*six[:5], *[vector] * 3, 1e-3)
    calls["wkv7_output_backward"] = lambda: OP.wkv7_output_backward(*six[:5], *[vector] * 3, 1e-3, six[5])
    calls["relu_squared"] = lambda: OP.relu_squared(hidden)
    gradient = torch.zeros_like(hidden)
    calls["relu_squared_backward"] = lambda: OP.relu_squared_backward_(hidden, gradient)
    logits = narrow(min(tokens, 2048), options.vocab_size)
    targets = torch.zeros(logits.shape[0], dtype=torch.int64, device=device)
    calls["cross_entropy"] = lambda: OP.cross_entropy_(logits, targets, None, True)

    print(f"\n{tokens} tokens of {width} channels, bfloat16; times include the second stage of sums")
    for name, call in calls.items():
        moved = 0
        run = launch.launcher(device)

        def count(kernel: launch.Kernel, blocks: int, arguments: Sequence[launch.Argument], run=run) -> None:
            nonlocal moved
            # Logits are read and written in one place.
            twice = 2 if kernel.name == "cross_entropy" else 1
            moved += twice * sum(z.nbytes for z in arguments if isinstance(z, Tensor))
            run(kernel, blocks, arguments)

        with patch.object(launch, "launcher", lambda _, count=count: count):
            call()
        seconds, floor = measure(call, device), moved / options.bandwidth
        print(f"{name:24} {seconds * 1e3:8.3f} ms, floor {floor * 1e3:7.3f} ms: {seconds / floor:6.1f}x")


if __name__ == "__main__":
    main()
