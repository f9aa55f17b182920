"""CUDA kernels compiled by NVRTC and launched through NVIDIA's cuda-core, so no CUDA toolkit is needed."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch

from streaming_rwkv.extras import install_command
from streaming_rwkv.ops.build import KernelError, cached, kernel_source

DEFAULT_SHARED_BYTES = 48 << 10  # of a block, without asking for more
Macros = tuple[tuple[str, str], ...]  # names and values


def launch(
    source: str,
    macros: Macros,
    name: str,
    device: torch.device,
    *,
    blocks: int,
    threads: int,
    arguments: list[int],
    shared_bytes: int = 0,
) -> None:
    """Run kernel `name` of kernels/`source` on torch's current stream of `device`.

    Args:
        arguments: integers and pointers, as the kernel declares them.
        shared_bytes: dynamic shared memory of a block.
    Raises:
        KernelError: the source cannot be compiled for this device, or the device has too little shared memory.
            cuda-core raises what the launch returns.
    """
    core = cuda_core()
    with torch.cuda.device(device):
        core.Device(torch.cuda.current_device()).set_current()  # torch's own context
        kernel = _kernel(source, macros, name, shared_bytes, torch.cuda.current_device())
        stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = core.LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)
        core.launch(stream, config, kernel, *arguments)


@functools.cache
def _kernel(source: str, macros: Macros, name: str, shared_bytes: int, device_index: int) -> Any:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device_index))
    kernel = _module(source, macros, architecture).get_kernel(name)
    if shared_bytes > DEFAULT_SHARED_BYTES:
        from cuda.bindings import driver  # with cuda-core, see cuda_core

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(device_index)
        (result,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, device)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(
                f"{name}: {architecture} does not give a block {shared_bytes} bytes of shared memory "
                f"({result.name}); use a GPU that does (A100, H100 and newer), or float32 inputs"
            )
    return kernel


@functools.cache
def _module(source: str, macros: Macros, architecture: str) -> Any:
    path = kernel_source(source)
    from cuda.bindings import nvrtc  # with cuda-core, see cuda_core

    core = cuda_core()
    headers = [header.read_bytes() for header in sorted(path.parent.glob("*.h"))]
    key: list[str | bytes] = [path.read_bytes(), *headers, architecture, repr(macros), repr(nvrtc.nvrtcVersion()[1:])]
    compiled = cached(
        f"{path.stem}-{architecture}.cubin",
        key,
        lambda out: _write(out, compile_cubin(path, macros, architecture)[0]),
    )
    return core.ObjectCode.from_cubin(compiled.read_bytes(), name=compiled.stem)


def compile_cubin(source: Path, macros: Macros, architecture: str) -> tuple[bytes, str]:
    """Compile for GPUs of `architecture` (sm_80, …); this needs no GPU.

    Returns the machine code, and ptxas's report of registers, spills and shared memory.

    Raises:
        KernelError: cuda-core is missing, or NVRTC refuses the source or the architecture.
    """
    core = cuda_core()
    options = core.ProgramOptions(
        arch=architecture,
        std="c++17",
        define_macro=list(macros) or None,
        include_path=[str(source.parent)],
        ptxas_options=["-v"],
        name=source.name,
    )
    log = io.StringIO()
    try:
        code = core.Program(source.read_text(), "c++", options=options).compile("cubin", logs=log).code
    except Exception as error:
        if type(error).__name__ != "NVRTCError":  # cuda-core keeps it private
            raise
        raise KernelError(
            f"{source}: NVRTC does not compile it for {architecture}: {error}\n{log.getvalue()}\n"
            "for an architecture newer than this NVRTC, install a newer nvidia-cuda-nvrtc or a newer torch"
        ) from error
    return bytes(code), log.getvalue().replace("\0", "")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@functools.cache
def cuda_core() -> Any:
    """Import the package cuda.core.

    Raises:
        KernelError: it is not installed.
    """
    try:
        import cuda.core as core
    except ImportError as error:
        raise KernelError(
            f"the CUDA kernels are compiled through cuda-core, which does not import here ({error}); "
            f"run {install_command('cuda')}"
        ) from error
    return core
