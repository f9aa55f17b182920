"""The CUDA kernel of WKV-7: compiled by NVRTC and launched through NVIDIA's cuda-core, so no CUDA toolkit is needed.

Nothing waits for the device: what is known only there, the documents' bounds, is used only there.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 16 + D saved states.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.extras import install_command
from streaming_rwkv.ops.build import KernelError, cached, kernel_source

logger = logging.getLogger(__name__)

SAVED_EVERY = 16  # tokens
THREADS = 128  # of a block
_MACROS = {torch.float32: None, torch.bfloat16: "WKV7_BFLOAT16"}

# Runs the named kernel for inputs of a dtype, on so many blocks, with integers and pointers for arguments.
Launch = Callable[[str, torch.dtype, int, list[int]], None]


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
    _, tokens, heads, size = r.shape
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    removed = r.new_empty((tokens, heads, size) if save else 0, dtype=torch.float32)
    states = r.new_empty((tokens // SAVED_EVERY + documents, heads, size, size) if save else 0, dtype=torch.float32)
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
    # Longest first: the last blocks to start are then the shortest.
    order = torch.argsort(cu_seqlens.diff(), descending=True, stable=True).to(torch.int32)
    cu_seqlens, order = (x.to(r.device, non_blocking=True) for x in (cu_seqlens, order))
    _, tokens, heads, _ = r.shape
    documents = cu_seqlens.shape[0] - 1
    # The kernel reads 16 bytes at a time; a view into another tensor may begin anywhere.
    aligned = [x.clone() if x is not None and x.data_ptr() % 16 else x for x in tensors]
    pointers = [0 if x is None else x.data_ptr() for x in (cu_seqlens, order, *aligned)]
    blocks = heads * (documents + 1)  # the last of each head clears the padding
    if launch is None:
        launch = functools.partial(_launch_on_device, r.device)
    launch(name, r.dtype, blocks, [tokens, heads, documents, *pointers])


def _launch_on_device(device: torch.device, name: str, dtype: torch.dtype, blocks: int, arguments: list[int]) -> None:
    """On torch's current stream of `device`. cuda-core raises what the launch returns."""
    core = _cuda_core()
    with torch.cuda.device(device):
        core.Device(torch.cuda.current_device()).set_current()  # torch's own context
        kernel = _module(dtype, "sm_{}{}".format(*torch.cuda.get_device_capability(device))).get_kernel(name)
        stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        core.launch(stream, core.LaunchConfig(grid=blocks, block=THREADS), kernel, *arguments)


@functools.cache
def _module(dtype: torch.dtype, architecture: str) -> Any:
    source = kernel_source("wkv7/wkv7.cu")
    from cuda.bindings import nvrtc  # with cuda-core, see _cuda_core

    core = _cuda_core()
    key: list[str | bytes] = [source.read_bytes(), architecture, str(dtype), repr(nvrtc.nvrtcVersion()[1:])]
    name = f"wkv7-{architecture}-{str(dtype).removeprefix('torch.')}.cubin"
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
        arch=architecture, std="c++17", define_macro=_MACROS[dtype], ptxas_options=["-v"], name=source.name
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
