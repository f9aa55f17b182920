"""The CUDA kernels of WKV-7 on the CPU, under cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from streaming_rwkv.ops import cuda
from streaming_rwkv.ops.build import build_cpp, kernel_source
from streaming_rwkv.ops.testing import INPUTS, Case


class Emulation:
    """Launches CUDA sources on the CPU, under cuda_on_cpu.h, in a GPU's place.

    Args:
        folder: of the sources and their headers, if they are not the project's own.
        seed: decides the order of threads.
        flags: for the compiler, after its own.
    """

    def __init__(self, *, folder: Path | None = None, seed: int = 0, flags: Sequence[str] = ()) -> None:
        self.folder = folder or kernel_source("wkv7/wkv7.cu").parent
        self.seed = seed
        self.flags = flags
        self.bank_conflicts: dict[str, int] = {}  # line of shared-memory access → wavefronts where one would do

    def __call__(self, kernel: cuda.Kernel, blocks: int, arguments: list[int]) -> None:
        library = self._library(kernel)
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        getattr(library, f"run_{kernel.name}")(blocks, kernel.threads, kernel.shared_bytes, self.seed, packed)
        library.first_error.restype = library.bank_conflicts.restype = ctypes.c_char_p
        if found := library.first_error().decode():
            raise RuntimeError(f"{kernel.name}: {found}")
        for line in library.bank_conflicts().decode().splitlines():
            where, wavefronts = line.split()
            self.bank_conflicts[where] = max(self.bank_conflicts.get(where, 0), int(wavefronts))

    def _library(self, kernel: cuda.Kernel) -> ctypes.CDLL:
        source = self.folder / Path(kernel.source).name
        flags = [f'-DSOURCE="{source}"', f"-D{source.stem}", f"-I{self.folder}", *self.flags]
        if kernel.dtype == torch.bfloat16:
            flags.append("-DWKV7_BFLOAT16")
        runner = Path(__file__).with_name("cuda_kernels_on_cpu.cpp")
        return ctypes.CDLL(str(build_cpp(runner, flags=flags, reads=[source, *sorted(self.folder.glob("*.h"))])))


def run_cuda_on_cpu(case: Case, module: ModuleType, launch: cuda.Launch | None, **options: object) -> dict[str, Tensor]:
    """Forward and backward as the op has them, launched by `launch`."""
    inputs = tuple(case.inputs)
    y, *saved = module.forward(inputs, case.initial_state, case.cu_seqlens, save=True, launch=launch, **options)
    gradients = module.backward(
        inputs, case.cu_seqlens, tuple(saved), case.dy, case.dfinal_state, initial_state=True, launch=launch, **options
    )  # fmt: skip
    names = (*(f"d{name}" for name in INPUTS), "dinitial_state")
    return {"y": y, "final_state": saved[0], **dict(zip(names, gradients, strict=True))}
