"""The kernels under test: each takes a `Case` and gives outputs and gradients by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streaming_rwkv.ops import cuda, wkv7
from streaming_rwkv.ops.build import build_cpp, kernel_source
from streaming_rwkv.ops.testing import INPUTS, Case, run

RunCase = Callable[[Case], dict[str, Tensor]]


def launch_on_cpu(dtype: torch.dtype, *, source: Path | None = None, seed: int = 0) -> cuda.Launch:
    """What stands in for the GPU: the CUDA source under cuda_on_cpu.h; `seed` decides the order of its threads."""
    source = source or kernel_source("wkv7/wkv7.cu")
    flags = [f'-DSOURCE="{source}"', *(["-DWKV7_BFLOAT16"] if dtype == torch.bfloat16 else [])]
    runner = Path(__file__).with_name("cuda_kernels_on_cpu.cpp")
    library = ctypes.CDLL(str(build_cpp(runner, flags=flags, reads=[source])))

    def launch(name: str, _: torch.dtype, blocks: int, arguments: list[int]) -> None:
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        getattr(library, f"run_{name}")(blocks, cuda.THREADS, seed, packed)

    return launch


def run_cuda_on_cpu(case: Case, launch: cuda.Launch) -> dict[str, Tensor]:
    """Forward and backward as the op has them, launched by `launch`."""
    inputs = tuple(case.inputs)
    y, *saved = cuda.forward(inputs, case.initial_state, case.cu_seqlens, save=True, launch=launch)
    gradients = cuda.backward(
        inputs, case.cu_seqlens, tuple(saved), case.dy, case.dfinal_state, initial_state=True, launch=launch
    )  # fmt: skip
    names = (*(f"d{name}" for name in INPUTS), "dinitial_state")
    return {"y": y, "final_state": saved[0], **dict(zip(names, gradients, strict=True))}


@pytest.fixture(scope="session")
def cuda_on_cpu() -> Callable[..., RunCase]:
    """cuda_on_cpu(source=…, seed=…) → a kernel under test."""

    def build(*, source: Path | None = None, seed: int = 0) -> RunCase:
        return lambda case: run_cuda_on_cpu(case, launch_on_cpu(case.dy.dtype, source=source, seed=seed))

    return build


@pytest.fixture(params=["C++", "CUDA on the CPU"])
def kernel(request: pytest.FixtureRequest, cuda_on_cpu: Callable[..., RunCase]) -> RunCase:
    return (lambda case: run(wkv7, case)) if request.param == "C++" else cuda_on_cpu()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
