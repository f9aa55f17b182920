"""WKV-7 on the CPU: the C++ kernel against the arithmetic it does, and against what PyTorch makes of the same maths.

    python bench/wkv7_cpu.py [--threads 2] [--heads 4] [--rounds 30]

The floor is the time in which these cores, at the rate measured in the same run, do 19·N² multiply-adds per token and
head (5 forward, 14 backward). Rate and times are each the best of all rounds, which interleave; the rate is taken over
a fraction of a millisecond, so that a busy machine makes the kernel look worse, never better. Beside it are the
rates that the vendor's code reaches on the same cores: torch.mm of large matrices, and torch.bmm of the products of a
chunk of 16 tokens, with nothing to compute before, between or after. Results are checked first; a wrong one is not
timed.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from streaming_rwkv.ops import wkv7
from streaming_rwkv.ops.build import build_cpp
from streaming_rwkv.ops.reference import wkv7_reference
from streaming_rwkv.ops.testing import Case, errors, make_case, run, run_reference

N = 64
SQUARE = 1024
CHUNKS, CHUNK = 512, 16  # 8192 tokens and heads
MULTIPLY_ADDS = 19 * N * N  # per token and head, forward and backward
PACKS = {"one document of 2048": [2048], "eight documents of 256": [256] * 8}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}


def wkv7_chunked(*inputs: Tensor, initial_state: Tensor, cu_seqlens: Tensor, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """Compute WKV-7 as is usual in PyTorch: dense products over chunks of tokens, all documents in parallel.

    float32; documents of one length, a multiple of `chunk`; decays as the model has them, since it divides by up to
    `chunk` of them. Shapes: D documents, H heads, C chunks, L = chunk, N head size.
    """
    documents, tokens = cu_seqlens.shape[0] - 1, inputs[0].shape[1]
    length = tokens // documents
    shape = (documents, length // chunk, chunk, *inputs[0].shape[2:])
    r, log_decay, k, v, a, b = (x.float().reshape(shape).transpose(2, 3).transpose(1, 2) for x in inputs)  # D H C L N
    since = log_decay.cumsum(-2)
    decay_in, decay_out = since.exp(), (-since).exp()
    a = a * (since - log_decay).exp()
    r = r * decay_in
    b, k = b * decay_out, k * decay_out
    r_b, r_k = ((r @ x.mT).tril() for x in (b, k))
    a_b, a_k = ((a @ x.mT).tril(-1) for x in (b, k))
    eye = torch.eye(chunk)
    solve = torch.linalg.solve_triangular(eye - a_b, eye.expand_as(a_b), upper=False, unitriangular=True)
    from_state, from_values = solve @ a, solve @ (a_k @ v)
    last = decay_in[..., -1:, :]
    b, k = b * last, k * last
    state, outputs = initial_state, []
    for n in range(length // chunk):
        removed = from_state[:, :, n] @ state.mT + from_values[:, :, n]
        outputs.append(r[:, :, n] @ state.mT + r_b[:, :, n] @ removed + r_k[:, :, n] @ v[:, :, n])
        state = state * last[:, :, n] + removed.mT @ b[:, :, n] + v[:, :, n].mT @ k[:, :, n]
    y = torch.stack(outputs, 2).transpose(1, 2).transpose(2, 3)
    return y.reshape(inputs[0].shape).to(inputs[0].dtype), state


def seconds(op: Callable[..., tuple[Tensor, Tensor]], case: Case) -> float:
    """Run one forward and backward pass."""
    started = time.perf_counter()
    run(op, case)
    return time.perf_counter() - started


def check(op: Callable[..., tuple[Tensor, Tensor]], case: Case, expected: dict[str, Tensor], name: str) -> None:
    worst = max(errors(run(op, case), expected).items(), key=lambda item: item[1])
    if not worst[1] <= BOUNDS[case.dy.dtype]:
        sys.exit(f"{name}: {worst[0]} is wrong by {worst[1]:.1e}, allowed is {BOUNDS[case.dy.dtype]:.1e}; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description="WKV-7 on the CPU, as multiples of the arithmetic floor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = ctypes.CDLL(str(build_cpp(Path(__file__).with_name("multiply_add.cpp"))))
    library.multiply_adds_per_second.restype = ctypes.c_double

    rate = 0.0
    product = float("inf")
    square = torch.randn(SQUARE, SQUARE)
    chunks, states = torch.randn(CHUNKS, CHUNK, N), torch.randn(CHUNKS, N, N)
    chunk_products = torch.empty_like(chunks)
    batched = float("inf")
    rows = []
    for name, lengths in PACKS.items():
        tokens = sum(lengths)
        expected = run_reference(make_case(lengths, heads=options.heads))
        reference = seconds(wkv7_reference, make_case(lengths, heads=options.heads))
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(lengths, heads=options.heads, dtype=dtype)
            check(wkv7, case, expected, "C++")
            cpp = chunked = float("inf")
            for _ in range(options.rounds):
                rate = max(rate, *(library.multiply_adds_per_second(options.threads) for _ in range(10)))
                cpp = min(cpp, seconds(wkv7, case))
                started = time.perf_counter()
                square @ square
                product = min(product, time.perf_counter() - started)
                started = time.perf_counter()
                torch.bmm(chunks, states, out=chunk_products)
                batched = min(batched, time.perf_counter() - started)
            if dtype == torch.float32:
                check(wkv7_chunked, case, expected, "chunked PyTorch")
                chunked = min(seconds(wkv7_chunked, case) for _ in range(5))
            rows.append((name, dtype, cpp, chunked, reference, tokens * options.heads))

    print(f"{options.threads} threads, {options.heads} heads: {rate / 1e9:.1f} G multiply-adds a second; floor "
          f"{MULTIPLY_ADDS / rate * 1e6:.3f} µs per token and head")  # fmt: skip
    print(f"torch.mm of {SQUARE} x {SQUARE} matrices: {product * rate / SQUARE**3:.2f}× its own floor")
    print(f"torch.bmm of {CHUNKS} products {CHUNK} x {N} by {N} x {N}: {batched * rate / chunks.numel() / N:.2f}×\n")
    print(f"{'':24}{'':10}{'C++, forward and backward':>30}{'slower than C++ by':>34}")
    print(f"{'':24}{'':10}{'µs':>16}{'× floor':>14}{'chunked PyTorch':>20}{'step by step':>14}")
    for name, dtype, cpp, chunked, reference, units in rows:
        kind = str(dtype).removeprefix("torch.")
        beside = f"{chunked / cpp:19.1f}×" if chunked < float("inf") else f"{'':20}"
        multiple = cpp / (units * MULTIPLY_ADDS / rate)
        print(f"{name:24}{kind:10}{cpp / units * 1e6:16.3f}{multiple:13.2f}×{beside}{reference / cpp:13.0f}×")


if __name__ == "__main__":
    main()
