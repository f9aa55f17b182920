"""The CUDA source without a GPU: what its emulation notices, and what NVRTC makes of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import wkv7_instructions
from streaming_rwkv.ops import cuda, cuda_chunked
from streaming_rwkv.ops.build import KernelError, kernel_source
from streaming_rwkv.ops.testing import Case, errors, make_case, run_reference

SOURCE = kernel_source("wkv7/wkv7.cu")
compile_cubin = functools.cache(cuda.compile_cubin)  # the chunked kernels take seconds
BuildKernel = Callable[..., Callable[[Case], dict[str, torch.Tensor]]]


def worst_error(kernel: Callable[[Case], dict[str, torch.Tensor]], case: Case) -> float:
    found = errors(kernel(case), run_reference(case)).values()
    return max(error if error == error else float("inf") for error in found)


BARRIERS = [number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if "__syncthreads();" in line]


@pytest.mark.parametrize("line", BARRIERS)
def test_no_barrier_can_be_left_out(cuda_on_cpu: BuildKernel, line: int) -> None:
    case = make_case([70], heads=1)
    broken = (cuda_on_cpu(seed=seed, left_out=(SOURCE.name, line)) for seed in range(3))
    assert max(worst_error(kernel, case) for kernel in broken) > 1e-3


def test_the_order_of_threads_changes_no_bit(cuda_on_cpu: BuildKernel) -> None:
    case = make_case([40, 17])
    first, second = (cuda_on_cpu(seed=seed)(case) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvrtc_compiles_it_within_bounds(architecture: str, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    _, log = cuda.compile_cubin(SOURCE, dtype, architecture)
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers.*?(\d+) bytes smem",
        log,
        flags=re.DOTALL,
    )
    assert [name for name, *_ in kernels] == ["wkv7_backward", "wkv7_forward"]
    for name, *numbers in kernels:
        stack, spilled, registers, shared = map(int, numbers)
        print(f"{architecture} {dtype} {name}: {registers} registers, {spilled} bytes spilled, {shared} shared")
        assert stack == spilled == 0
        assert registers <= 168  # three blocks of 128 threads in a multiprocessor's 65,536
        assert shared <= 48 << 10  # what a kernel gets without asking


CHUNKED = [
    *(shape.kernel(direction) for shape in cuda_chunked.SHAPES for direction in ("forward", "backward")),
    cuda_chunked.GRADIENTS,
]
BLOCKS = {"wide": 4, "narrow": 2, "split_in_two": 1, "split_in_four": 1, "gradients": 3}  # of an H100's multiprocessor


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["wkv7/chunked_chains.cu", "wkv7/chunked_gradients.cu"])
def test_nvrtc_compiles_the_chunked_kernels_for_as_many_blocks_as_planned(architecture: str, source: str) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    _, log = compile_cubin(kernel_source(source), torch.bfloat16, architecture)
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    used = {name: tuple(map(int, numbers)) for name, *numbers in found}
    kernels = [kernel for kernel in CHUNKED if kernel.source == source]
    assert sorted(used) == sorted(kernel.name for kernel in kernels)
    for kernel in kernels:
        stack, spilled, registers = used[kernel.name]
        assert stack == spilled == 0, kernel.name
        blocks = next(blocks for name, blocks in BLOCKS.items() if kernel.name.endswith(name))
        per_warp = -(-registers // 8) * 8 * 32  # as they are handed out
        assert blocks * kernel.threads // 32 * per_warp <= 65536, kernel.name
        assert kernel.shared_bytes <= 163 << 10, kernel.name  # of an A100's block
        assert blocks * (kernel.shared_bytes + 1024) <= 228 << 10, kernel.name  # of an H100's multiprocessor


def test_the_bench_counts_instructions_per_chunk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    pytest.importorskip("triton", exc_type=ImportError)  # brings nvdisasm
    monkeypatch.setattr(cuda, "compile_cubin", compile_cubin)
    wkv7_instructions.show("sm_90")
    totals = dict(re.findall(r"^(\w+) .* = (\d+) \(plan \d+\)", capsys.readouterr().out, flags=re.MULTILINE))
    # 2765, 2201 and 9274 when they were written; a fifth more would be a loss of speed to look into.
    assert int(totals["forward_wide"]) <= 3100
    assert int(totals["backward_wide"]) <= 2650
    assert int(totals["gradients"]) <= 11000


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    with pytest.raises(KernelError, match=r"wkv7\.cu: NVRTC does not compile it for sm_10: .*"):
        cuda.compile_cubin(SOURCE, torch.float32, "sm_10")


def test_source_that_does_not_compile_shows_the_compilers_words(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    path = tmp_path / "broken.cu"
    path.write_text('extern "C" __global__ void f() { missing(); }')
    with pytest.raises(KernelError, match='identifier "missing" is undefined'):
        cuda.compile_cubin(path, torch.float32, "sm_80")
