"""A training step on the CPU with the C++ kernels, and with what PyTorch makes of the same maths in their place.

    python bench/training_step.py [--hidden-size 128] [--layers 4] [--vocab-size 4096] [--threads 2]

Forward, backward and AdamW on one pack of equally long documents (what the chunked form can do), float32. The forms
take turns, and the best of all rounds counts; their losses are compared first. The first two, all kernels against an
eager layer round the kernel of WKV-7, take turns step by step, and the median of their ratios counts; they come before
the others, whose larger tensors change from then on which memory the C library returns to the system.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from wkv7_cpu import wkv7_chunked

from streaming_rwkv.model import rwkv7
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.init import initialize
from streaming_rwkv.ops import definitions, wkv7
from streaming_rwkv.ops.reference import wkv7_reference
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer


def chunked(*inputs: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    documents, (_, _, heads, size) = cu_seqlens.shape[0] - 1, inputs[0].shape
    zeros = inputs[0].new_zeros(documents, heads, size, size)
    return wkv7_chunked(*inputs, initial_state=zeros if initial_state is None else initial_state, cu_seqlens=cu_seqlens)


PAIR = ("C++", "eager layer")
FORMS = {"C++": wkv7, "eager layer": wkv7, "chunked PyTorch": chunked, "step by step": wkv7_reference}
KERNELS = ("streaming_rwkv::wkv7", "streaming_rwkv::wkv7_backward")
ROUNDS = {"chunked PyTorch": 3, "step by step": 1}
PAIRS = 10  # in a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="each of 10 pairs and of 3 and 1 steps of the others")
    parser.add_argument("--pairs-only", action="store_true", help="leave out the last two forms")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = RWKV7Config(hidden_size=options.hidden_size, num_layers=options.layers, vocab_size=options.vocab_size)
    tokens = options.documents * options.length
    bounds = torch.arange(0, tokens + 1, options.length, dtype=torch.int32)
    ids = torch.randint(options.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    print(f"{options.layers} layers of {options.hidden_size}, {options.vocab_size} words, {options.threads} threads;")
    print(f"{options.documents} documents of {options.length} tokens\n")

    def trainer(name: str) -> Callable[[], float]:
        """A step of training that returns the loss."""
        network = rwkv7.RWKV7(config)
        initialize(network, seed=0)
        optimizer = build_optimizer(network, OptimizerConfig(lr=1e-3))

        def step() -> float:
            eager = contextlib.nullcontext() if name == "C++" else definitions()
            with patch.object(rwkv7, "wkv7", FORMS[name]), eager:
                loss = network(ids[:, :-1], cu_seqlens=bounds, targets=ids[:, 1:]).sum() / tokens
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    steps: dict[str, Callable[[], float]] = {}
    losses: dict[str, list[float]] = {}
    best: dict[str, float] = {}

    def add(name: str) -> None:
        steps[name], best[name] = trainer(name), float("inf")
        losses[name] = [steps[name]() for _ in range(2)]
        if not all(abs(x - y) < 1e-3 for x, y in zip(losses[name], losses["C++"], strict=True)):
            sys.exit(f"{name}: losses {losses[name]}, with C++ {losses['C++']}: not the same maths, no comparison")

    def timed(name: str) -> float:
        started = time.perf_counter()
        steps[name]()
        seconds = time.perf_counter() - started
        best[name] = min(best[name], seconds)
        return seconds

    for name in PAIR:
        add(name)
    times = [[timed(name) for name in PAIR] for _ in range(options.rounds * PAIRS)]
    ratios = [eager / fused for fused, eager in times]
    if not options.pairs_only:
        for name in ROUNDS:
            add(name)
        for _ in range(options.rounds):
            for name, count in ROUNDS.items():
                for _ in range(count):
                    timed(name)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(5):
            steps["C++"]()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    kernel = sum(event.self_cpu_time_total for event in events if event.key in KERNELS)
    for name, seconds in best.items():
        print(f"{name:16} {tokens / seconds:9.0f} tokens/s   C++ is {seconds / best['C++']:6.1f}x as fast")
    print(f"All kernels against an eager layer: {statistics.median(ratios):.2f}x, the median of {len(ratios)} pairs.")
    print(f"The op of WKV-7, forward and backward, takes {kernel / total:.0%} of the step's time with C++.")


if __name__ == "__main__":
    main()
