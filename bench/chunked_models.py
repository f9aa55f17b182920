"""The chunked WKV-7 kernel in models: how far bfloat16 autocast is from float32, beside the sequential kernel.

    python -m bench.chunked_models              100 models of 4 layers
    python -m bench.chunked_models --count 400

The bound is a ratio of at most 1: losses and gradients differ from float32 no more with chunks than without. "exact" is
WKV-7 in float64, whose results are rounded once: what it gives, no kernel with bfloat16 outputs can improve on. The
CUDA kernels run under the emulation of the tests.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from streaming_rwkv.ops.reference import wkv7_reference
from tests.ops.autocast_models import CHUNKED, SEQUENTIAL, Distances, distances_from_float32

BOUND = 1.0


class Exact:
    """WKV-7 by its definition in float64, with the results rounded to the types of the kernels'."""

    def forward(
        self, inputs: Sequence[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor, *, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert initial_state is None
        with torch.autocast("cpu", enabled=False):
            y, state = wkv7_reference(*(x.double() for x in inputs), cu_seqlens=cu_seqlens)
        return y.to(inputs[0].dtype), state.float(), inputs[0].new_empty(0), inputs[0].new_empty(0)

    def backward(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        saved: Sequence[Tensor],
        dy: Tensor,
        dfinal_state: Tensor | None,
        *,
        initial_state: bool,
    ) -> tuple[Tensor, ...]:
        assert not initial_state
        assert dfinal_state is None
        with ThreadPoolExecutor(1) as thread:  # within an op, this thread has no autograd
            exact = thread.submit(self._gradients, inputs, cu_seqlens, dy).result()
        return *(g.to(dy.dtype) for g in exact), torch.empty(0)

    def _gradients(self, inputs: Sequence[Tensor], cu_seqlens: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        exact = [x.double().requires_grad_() for x in inputs]
        y, _ = wkv7_reference(*exact, cu_seqlens=cu_seqlens)
        return torch.autograd.grad(y, exact, dy.double())


def _median_with_error(values: list[float]) -> tuple[float, float]:
    """Return the median, and its standard error from the spread of the middle half."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, 1.25 * (high - low) / 1.35 / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="models (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default %(default)s)")
    options = parser.parse_args()
    kernels = {"sequential": SEQUENTIAL, "chunked": CHUNKED, "exact": Exact()}
    seeds = range(options.first, options.first + options.count)
    distances = [distances_from_float32(seed, kernels) for seed in seeds]
    print(f"{options.count} models; distance from float32 as a multiple of the sequential kernel's, median ± its error")
    for field in Distances._fields:
        for name in ("chunked", "exact"):
            ratios = [getattr(of[name], field) / getattr(of["sequential"], field) for of in distances]
            median, error = _median_with_error(ratios)
            verdict = "" if name == "exact" else "  met" if median <= BOUND else f"  MISSED by {median - BOUND:.3f}"
            worse = sum(ratio > 1 for ratio in ratios)
            print(f"{field:<10} {name:<8} {median:.4f} ± {error:.4f}  larger in {worse} of {len(ratios)}{verdict}")


if __name__ == "__main__":
    main()
