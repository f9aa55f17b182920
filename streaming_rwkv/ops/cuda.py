"""The sequential CUDA kernel of WKV-7, and how CUDA kernels get to a GPU: NVRTC compiles them and NVIDIA's cuda-core
launches them, so no CUDA toolkit is needed.

Nothing waits for the device: what is known only there, the documents' bounds, is used only there.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 16 + D saved states.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streaming_rwkv.extras import install_command
from streaming_rwkv.ops.build import KernelError, cached, kernel_source

logger = logging.getLogger(__name__)

SAVED_EVERY = 16  # tokens
THREADS = 128  # of a block
DEFAULT_SHARED_BYTES = 48 << 10  # of a block, without asking for more
_MACROS = {torch.float32: None, torch.bfloat16: "WKV7_BFLOAT16"}


class Kernel(NamedTuple):
    """A `__global__` function and the blocks it is written for."""

    source: str  # below kernels/
    name: str
    dtype: torch.dtype  # of the inputs
    threads: int  # of a block
    shared_bytes: int = 0  # dynamic shared memory of a block


# Runs a kernel on a number of blocks, with integers and pointers for arguments.
Launch = Callable[[Kernel, int, list[int]], None]


def empty_saved(r: Tensor, documents: int, *, save: bool) -> tuple[Tensor, Tensor]:
    """Room for removed (T, H, N) and states (K, H, N, N), float32; or for nothing."""
    _, tokens, heads, size = r.shape
    slots = tokens // SAVED_EVERY + documents
    return (
        r.new_empty((tokens, heads, size) if save else 0, dtype=torch.float32),
        r.new_empty((slots, heads, size, size) if save else 0, dtype=torch.float32),
    )


def forward(
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    save: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous (1, T, H, N) inputs → y, final_state (D, H, N, N), and for `backward` removed (T, H, N) and states
    (K, H, N, N); the last two are empty unless `save`."""
    r = inputs[0]
    heads, size = r.shape[2:]
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    removed, states = empty_saved(r, documents, save=save)
    kept = (removed, states) if save else (None, None)
    _run("wkv7_forward", r, cu_seqlens, [*inputs, initial_state, y, final_state, *kept], launch)
    return y, final_state, removed, states


def backward(
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    *,
    initial_state: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs and, if `initial_state`, of the initial state (else an empty tensor).

    Args:
        saved: final_state, removed and states as `forward` returned them.
    """
    r = inputs[0]
    gradients = [torch.empty_like(x) for x in inputs]
    dinitial_state = r.new_empty(saved[0].shape if initial_state else 0, dtype=torch.float32)
    written = [*gradients, dinitial_state if initial_state else None]
    _run("wkv7_backward", r, cu_seqlens, [*inputs, *saved, dy, dfinal_state, *written], launch)
    return *gradients, dinitial_state


def _run(name: str, r: Tensor, cu_seqlens: Tensor, tensors: Sequence[Tensor | None], launch: Launch | None) -> None:
    blocks = r.shape[2] * cu_seqlens.shape[0]  # a head's documents, and one more block that clears the padding
    run_kernel(Kernel("wkv7/wkv7.cu", name, r.dtype, THREADS), r, cu_seqlens, blocks, tensors, launch)


def run_kernel(
    kernel: Kernel, r: Tensor, cu_seqlens: Tensor, blocks: int, tensors: Sequence[Tensor | None], launch: Launch | None
) -> None:
    """Run a kernel whose arguments are T, H, D, cu_seqlens, the documents by length, and `tensors`."""
    # Longest first: the last blocks to start are then the shortest.
    order = torch.argsort(cu_seqlens.diff(), descending=True, stable=True).to(torch.int32)
    cu_seqlens, order = (x.to(r.device, non_blocking=True) for x in (cu_seqlens, order))
    _, tokens, heads, _ = r.shape
    documents = cu_seqlens.shape[0] - 1
    # The kernel reads 16 bytes at a time; a view into another tensor may begin anywhere.
    aligned = [x.clone() if x is not None and x.data_ptr() % 16 else x for x in tensors]
    pointers = [0 if x is None else x.data_ptr() for x in (cu_seqlens, order, *aligned)]
    if launch is None:
        launch = functools.partial(_launch_on_device, r.device)
    launch(kernel, blocks, [tokens, heads, documents, *pointers])


def _launch_on_device(device: torch.device, kernel: Kernel, blocks: int, arguments: list[int]) -> None:
    """Launch on torch's current stream of `device`. cuda-core raises what the launch returns."""
    core = _cuda_core()
    with torch.cuda.device(device):
        core.Device(torch.cuda.current_device()).set_current()  # torch's own context
        function = _function(kernel, torch.cuda.current_device())
        stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = core.LaunchConfig(grid=blocks, block=kernel.threads, shmem_size=kernel.shared_bytes)
        core.launch(stream, config, function, *arguments)


@functools.cache
def _function(kernel: Kernel, device_index: int) -> Any:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device_index))
    function = _module(kernel.source, kernel.dtype, architecture).get_kernel(kernel.name)
    if kernel.shared_bytes > DEFAULT_SHARED_BYTES:
        from cuda.bindings import driver  # with cuda-core, see _cuda_core

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(device_index)
        (result,) = driver.cuKernelSetAttribute(attribute, kernel.shared_bytes, function.handle, device)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(
                f"{kernel.name}: {architecture} does not give a block {kernel.shared_bytes} bytes of shared memory "
                f"({result.name}); use a GPU that does (A100, H100 and newer), or float32 inputs"
            )
    return function


@functools.cache
def _module(source_name: str, dtype: torch.dtype, architecture: str) -> Any:
    source = kernel_source(source_name)
    from cuda.bindings import nvrtc  # with cuda-core, see _cuda_core

    core = _cuda_core()
    headers = [path.read_bytes() for path in sorted(source.parent.glob("*.h"))]
    key: list[str | bytes] = [source.read_bytes(), *headers, architecture, str(dtype), repr(nvrtc.nvrtcVersion()[1:])]
    name = f"{source.stem}-{architecture}-{str(dtype).removeprefix('torch.')}.cubin"
    path = cached(name, key, lambda path: _write(path, compile_cubin(source, dtype, architecture)[0]))
    return core.ObjectCode.from_cubin(path.read_bytes(), name=path.stem)


def compile_cubin(source: Path, dtype: torch.dtype, architecture: str) -> tuple[bytes, str]:
    """Machine code for GPUs of `architecture` (sm_80, …) and inputs of `dtype`, and what ptxas says of registers,
    spills and shared memory. Needs no GPU.

    Raises:
        KernelError: cuda-core is missing, or NVRTC refuses the source or the architecture.
    """
    core = _cuda_core()
    options = core.ProgramOptions(
        arch=architecture,
        std="c++17",
        define_macro=_MACROS[dtype],
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
def _cuda_core() -> Any:
    try:
        import cuda.core as core
    except ImportError as error:
        raise KernelError(
            f"the CUDA kernel is compiled through cuda-core, which does not import here ({error}); "
            f"run {install_command('cuda')}"
        ) from error
    return core
