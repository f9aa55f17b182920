"""layer.cu without a GPU: what its emulation notices, and what NVRTC makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from streaming_rwkv.ops import launch, nvrtc
from streaming_rwkv.ops.build import kernel_source
from streaming_rwkv.ops.launch import Kernel
from streaming_rwkv.ops.testing import errors
from tests.ops import layer_kernels as kernels

SOURCE = kernel_source(launch.CUDA_SOURCE)


def norm_mix() -> dict[str, Tensor]:
    case = kernels.norm_mix_case([40], width=320)  # three warps, three tiles
    return errors_of(kernels.run(case, torch.float32), kernels.run(case, torch.float64))


def cross_entropy() -> dict[str, Tensor]:
    case = kernels.cross_entropy_case(4, 1030, scales=True)
    names = ("nll", "gradient")
    found, expected = (kernels.run_cross_entropy(case, dtype) for dtype in (torch.float32, torch.float64))
    return errors_of(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


def sums() -> dict[str, Tensor]:
    case = kernels.wkv7_output_case(40)
    return errors_of(kernels.run(case, torch.float32), kernels.run(case, torch.float64))


def errors_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: math.inf if math.isnan(error) else error for name, error in errors(found, expected).items()}


# In the order of the source.
USES: tuple[Callable[[], dict[str, float]], ...] = (norm_mix, cross_entropy, cross_entropy, sums)


BARRIERS = [number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if "__syncthreads();" in line]


def test_every_barrier_has_its_use() -> None:
    assert len(BARRIERS) == len(USES)


@pytest.mark.parametrize(("line", "use"), list(zip(BARRIERS, USES, strict=False)))
def test_no_barrier_can_be_left_out(
    line: int, use: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = 0.0
    for seed in range(3):
        broken = kernels.cuda_on_cpu(left_out=line, seed=seed)
        monkeypatch.setattr(launch, "launcher", lambda _, broken=broken: broken)
        worst = max(worst, *use().values())
    assert worst > 1e-3


@pytest.mark.parametrize("width", [128, 320])
def test_the_order_of_threads_changes_no_bit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (1, 2):
        run = kernels.cuda_on_cpu(seed=seed)
        monkeypatch.setattr(launch, "launcher", lambda _, run=run: run)
        found.append(kernels.run(kernels.norm_mix_case([40, 17], width=width), torch.float32))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


float32, bfloat16 = torch.float32, torch.bfloat16
# The widths of the released models: 0.1B, 0.4B, 1.5B, 2.9B; vocabularies of World and of another that is odd.
COMPILED = [
    *(Kernel("norm_mix_forward", dtypes, width, mixes)
      for dtypes, width in (((float32, bfloat16), 768), ((float32, bfloat16), 1024), ((float32, bfloat16), 2048),
                            ((bfloat16, bfloat16), 2560), ((float32, float32), 2560)) for mixes in (1, 6)),
    *(Kernel(name, (dtype,), width) for name in ("wkv7_inputs_forward", "wkv7_output_forward")
      for dtype, width in ((bfloat16, 768), (bfloat16, 2048), (float32, 2560))),
    Kernel("relu_squared_forward", (bfloat16,), 8192),
    Kernel("relu_squared_forward", (float32,), 3072),
    Kernel("cross_entropy", (bfloat16,), 65536),
    Kernel("cross_entropy", (float32,), 50277),
    Kernel("sum_blocks", (), 0),
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: f"{launch.symbol(kernel)}-{kernel.width}")
def test_nvrtc_compiles_it_within_bounds(kernel: Kernel, architecture: str) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    _, log = nvrtc.compile_cubin(SOURCE, launch.macros(kernel), architecture)
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    stem = kernel.name.removesuffix("_forward")
    assert sorted({name.removesuffix("_forward").removesuffix("_backward") for name, *_ in found}) == [stem]
    threads = launch.cuda_threads(kernel)
    for name, stack, spilled, registers in found:
        print(f"{architecture} {launch.symbol(kernel)} {kernel.width} {name}: {registers} registers, {threads} threads")
        assert int(stack) == int(spilled) == 0
        assert int(registers) * threads <= 65536  # of a multiprocessor
