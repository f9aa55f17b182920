"""The CUDA kernels of WKV-7 on the CPU, under cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import functools
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
        left_out: the barrier, commit or wait that does nothing: its file's name and its line.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        seed: int = 0,
        flags: Sequence[str] = (),
        left_out: tuple[str, int] = ("", 0),
    ) -> None:
        self.folder = folder or kernel_source("wkv7/wkv7.cu").parent
        self.seed = seed
        self.flags = flags
        self.left_out = left_out
        self.bank_conflicts: dict[str, int] = {}  # line of shared-memory access → wavefronts where one would do

    def __call__(self, kernel: cuda.Kernel, blocks: int, arguments: list[int]) -> None:
        source = self.folder / Path(kernel.source).name
        flags = ["-DWKV7_BFLOAT16"] if kernel.dtype == torch.bfloat16 else []
        library = _library(source, (*flags, *self.flags))
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        file, line = self.left_out
        library.leave_out(file.encode(), line)
        getattr(library, f"run_{kernel.name}")(blocks, kernel.threads, kernel.shared_bytes, self.seed, packed)
        library.first_error.restype = library.bank_conflicts.restype = ctypes.c_char_p
        if found := library.first_error().decode():
            raise RuntimeError(f"{kernel.name}: {found}")
        for conflict in library.bank_conflicts().decode().splitlines():
            where, wavefronts = conflict.split()
            self.bank_conflicts[where] = max(self.bank_conflicts.get(where, 0), int(wavefronts))


@functools.cache
def _library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    runner = Path(__file__).with_name("cuda_kernels_on_cpu.cpp")
    flags = (f'-DSOURCE="{source}"', f"-D{source.stem}", f"-I{source.parent}", "-O1", *flags)
    return ctypes.CDLL(str(build_cpp(runner, flags=flags, reads=[source, *sorted(source.parent.glob("*.h"))])))


def run_cuda_on_cpu(case: Case, module: ModuleType, launch: cuda.Launch | None, **options: object) -> dict[str, Tensor]:
    """Forward and backward as the op has them, launched by `launch`."""
    inputs = tuple(case.inputs)
    y, *saved = module.forward(inputs, case.initial_state, case.cu_seqlens, save=True, launch=launch, **options)
    gradients = module.backward(
        inputs, case.cu_seqlens, tuple(saved), case.dy, case.dfinal_state, initial_state=True, launch=launch, **options
    )  # fmt: skip
    names = (*(f"d{name}" for name in INPUTS), "dinitial_state")
    return {"y": y, "final_state": saved[0], **dict(zip(names, gradients, strict=True))}
