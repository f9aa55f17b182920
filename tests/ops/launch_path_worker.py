"""Run by test_launch_path.py where libcuda.so.1 is cuda_driver.cpp: every CUDA kernel, launched by cuda-core.

    python tests/ops/launch_path_worker.py → one JSON object: launches, errors of results by case, kernels, a refusal

torch's side of a GPU (current device and stream, properties) is replaced, since tensors are on the CPU. From there on
everything is what a GPU runs: NVRTC's machine code, cuda-core's choice of device, context and stream, its packing of
arguments. The driver then reads of the machine code how many arguments a kernel takes and how long they are, and the
emulation runs the kernel with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a program has its own folder there, not the checkout

from streaming_rwkv.ops import cuda, cuda_chunked, launch, nvrtc, time_mixing
from streaming_rwkv.ops.build import KernelError
from streaming_rwkv.ops.testing import errors, make_case, run_reference
from streaming_rwkv.ops.testing import run as run_wkv7
from tests.ops import layer_kernels
from tests.ops.emulation import Emulation, run_cuda_on_cpu

SUCCESS, INVALID_VALUE = 0, 1  # CUresult
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
SHARED_BYTES_OF_A_BLOCK = 227 << 10  # at most, as on an H100
PARAMETER, MAX_THREADS = 0x17, 0x05  # attributes in .nv.info
LONG_FORMAT = 0x04  # of an attribute: as many bytes follow as it says


class Gpu:
    """Current device and stream, as torch.cuda has them."""

    index = 0
    stream = 0


class MachineCode(NamedTuple):
    """Of a kernel: bytes of each argument, threads of a block at most, static shared memory."""

    arguments: list[int]
    threads: int
    static_shared_bytes: int


def read_machine_code(elf: bytes) -> dict[str, MachineCode]:
    """Return the kernels of a cubin by name."""
    header, size, count, names_at = struct.unpack_from("<Q", elf, 0x28)[0], *struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, header + n * size) for n in range(count)]
    names = sections[names_at][4]

    def content(name_at: int) -> str:
        return elf[names + name_at : elf.index(b"\0", names + name_at)].decode()

    by_name = {content(section[0]): section for section in sections}
    found = {}
    for section, (_, _, _, _, offset, length) in by_name.items():
        if not section.startswith(".nv.info."):
            continue
        kernel = section.removeprefix(".nv.info.")
        arguments: dict[int, int] = {}
        threads, at = 0, offset
        while at < offset + length:
            form, attribute, value = struct.unpack_from("<BBH", elf, at)
            at += 4
            if form != LONG_FORMAT:
                continue
            if attribute == PARAMETER:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", elf, at)
                arguments[ordinal] = packed >> 18
            elif attribute == MAX_THREADS:
                threads = struct.unpack_from("<I", elf, at)[0]
            at += value
        shared = by_name.get(f".nv.shared.{kernel}")
        found[kernel] = MachineCode([arguments[n] for n in sorted(arguments)], threads, shared[5] if shared else 0)
    return found


class LaunchConfig(ctypes.Structure):
    """`LaunchConfig` of cuda_driver.cpp."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


int32, int64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
HOOKS = {
    "load": ctypes.CFUNCTYPE(int64, pointer),
    "find": ctypes.CFUNCTYPE(int64, int64, ctypes.c_char_p),
    "set_attribute": ctypes.CFUNCTYPE(int32, int64, int32, int32, int32),
    "launch": ctypes.CFUNCTYPE(int32, int64, ctypes.POINTER(LaunchConfig), int32, ctypes.POINTER(pointer)),
}


class Hooks(ctypes.Structure):
    """`Hooks` of cuda_driver.cpp."""

    _fields_ = list(HOOKS.items())


class Driver:
    """What cuda_driver.cpp leaves to Python: modules, the limits of kernels, and launches."""

    def __init__(self) -> None:
        self.libraries: list[dict[str, MachineCode]] = []
        self.origins: dict[bytes, tuple[str, nvrtc.Macros]] = {}  # machine code → source and macros
        self.of_library: list[tuple[str, nvrtc.Macros]] = []
        self.kernels: list[tuple[int, str]] = []  # library and name; a handle is an index into these, and 1
        self.shared_bytes: dict[tuple[int, int], int] = {}  # (kernel, device) → dynamic ones that it may have
        self.most_shared_bytes = SHARED_BYTES_OF_A_BLOCK
        self.launches: list[dict[str, Any]] = []
        self.case = ""
        self.hooks = Hooks(*(form(getattr(self, name)) for name, form in HOOKS.items()))
        ctypes.CDLL("libcuda.so.1").set_hooks(ctypes.byref(self.hooks))

    def load(self, code: int) -> int:
        sections_at = struct.unpack("<Q", ctypes.string_at(code + 0x28, 8))[0]
        programs_at = struct.unpack("<Q", ctypes.string_at(code + 0x20, 8))[0]
        program, programs, section, sections = struct.unpack("<HHHH", ctypes.string_at(code + 0x36, 8))
        elf = ctypes.string_at(code, max(sections_at + section * sections, programs_at + program * programs))
        self.libraries.append(read_machine_code(elf))
        self.of_library.append(self.origins[elf])
        return len(self.libraries)

    def find(self, library: int, name: bytes) -> int:
        if name.decode() not in self.libraries[library - 1]:
            return 0
        self.kernels.append((library - 1, name.decode()))
        return len(self.kernels)

    def set_attribute(self, kernel: int, attribute: int, value: int, device: int) -> int:
        library, name = self.kernels[kernel - 1]
        static = self.libraries[library][name].static_shared_bytes
        if attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES or value + static > self.most_shared_bytes:
            return INVALID_VALUE
        self.shared_bytes[kernel, device] = value
        return SUCCESS

    def launch(self, kernel: int, config: Any, device: int, arguments: Any) -> int:
        config = config.contents
        library, name = self.kernels[kernel - 1]
        code, (source, macros) = self.libraries[library][name], self.of_library[library]
        allowed = self.shared_bytes.get((kernel, device), nvrtc.DEFAULT_SHARED_BYTES - code.static_shared_bytes)
        blocks, threads = config.grid[0], config.block[0]
        self.launches.append({
            "case": self.case, "source": source, "kernel": name, "grid": list(config.grid),
            "block": list(config.block), "shared_bytes": config.shared_bytes, "stream": config.stream or 0,
            "device": device, "arguments": code.arguments, "macros": dict(macros),
            "thread": threading.current_thread() is not threading.main_thread(),
        })  # fmt: skip
        if config.shared_bytes > allowed or threads > code.threads or not blocks:
            return INVALID_VALUE
        values = [ctypes.cast(arguments[n], ctypes.POINTER(int64))[0] for n in range(len(code.arguments))]
        if source == launch.CUDA_SOURCE:
            layer_kernels.emulate(name, macros, blocks, threads, values)
        else:
            dtype = torch.bfloat16 if macros else torch.float32
            Emulation()(cuda.Kernel(source, name, dtype, threads, config.shared_bytes), blocks, values)
        return SUCCESS


def replace_torch(driver: Driver, multiprocessors: dict[str, int]) -> None:
    """Have tensors on the CPU go the way of tensors on a GPU."""
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_device = lambda: Gpu.index
    torch.cuda.current_stream = lambda _: SimpleNamespace(cuda_stream=Gpu.stream)  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda _: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(  # type: ignore[assignment]
        multi_processor_count=multiprocessors["count"], shared_memory_per_block_optin=SHARED_BYTES_OF_A_BLOCK
    )
    launch.launcher = lambda _: launch.launch_cuda
    time_mixing._kernel = time_mixing._cuda_kernel
    compiled = nvrtc._module

    def module(source: str, macros: nvrtc.Macros, architecture: str) -> Any:
        """Note what the driver cannot know: the source of the machine code that it is given."""
        found = compiled(source, macros, architecture)
        driver.origins[bytes(found.code)] = source, macros
        return found

    nvrtc._module = module


Results = dict[str, Tensor]


def layer_cases() -> dict[str, layer_kernels.OpCase]:
    return {
        "six mixes of a pack": layer_kernels.norm_mix_case([5, 1, 0, 17], padding=3),
        "one mix of rows": layer_kernels.norm_mix_case([9], rows=2, mixes=1),
        "inputs of wkv7": layer_kernels.wkv7_inputs_case(18),
        "output of wkv7": layer_kernels.wkv7_output_case(18),
        "ReLU² and its projection": layer_kernels.relu_squared_case(18),
    }


def cases() -> dict[str, tuple[Callable[[], Results], Callable[[], Results]]]:
    """By name: what runs on the device, and the definition in float64."""
    found: dict[str, tuple[Callable[[], Results], Callable[[], Results]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        case = make_case([1, 15, 17, 0, 40], dtype=dtype, padding=3)
        sequential = functools.partial(run_cuda_on_cpu, case, cuda, None)
        found[f"wkv7 step by step, {name}"] = sequential, functools.partial(run_reference, case)
        for op, inputs in layer_cases().items():
            # As under autocast: the residual stream stays in float32.
            ours = functools.partial(layer_kernels.run, inputs, dtype, residual=torch.float32)
            found[f"{op}, {name}"] = ours, functools.partial(layer_kernels.run, inputs, torch.float64)
        logits = layer_kernels.cross_entropy_case(12, 97, scales=True)
        found[f"loss, {name}"] = functools.partial(loss, logits, dtype), functools.partial(loss, logits, torch.float64)
    for shape in cuda_chunked.SHAPES:
        case = make_case([70, 0, 17], dtype=torch.bfloat16, padding=3)
        ours = functools.partial(run_wkv7, time_mixing.wkv7, case)
        found[f"wkv7 in chunks, {shape.name}"] = ours, functools.partial(run_reference, case)
    return found


def loss(case: dict[str, Any], dtype: torch.dtype) -> Results:
    return dict(zip(("nll", "gradient"), layer_kernels.run_cross_entropy(case, dtype), strict=True))


# For 4 chains: two heads of documents that count as two, since the longest has 70 of their 87 tokens.
MULTIPROCESSORS = {"wide": 2, "narrow": 4, "split_in_two": 8, "split_in_four": 16}


def in_thread(work: Callable[[], Results]) -> Results:
    """Run `work` in a thread that has used no GPU yet, as autograd runs a backward pass on one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except KernelError as error:
        return str(error)
    return "not refused"


def main() -> None:
    torch.set_num_threads(1)
    all_cases = cases()
    exact = {name: definition() for name, (_, definition) in all_cases.items()}
    multiprocessors = {"count": 0}
    driver = Driver()
    replace_torch(driver, multiprocessors)
    found = {}
    for name, (work, _) in all_cases.items():
        driver.case = name
        multiprocessors["count"] = MULTIPROCESSORS.get(name.rpartition(" ")[2], 0)
        cuda_chunked._limits.cache_clear()
        second = "bfloat16" in name or "chunks" in name
        Gpu.index, Gpu.stream = (1, 0x5555) if second else (0, 0)
        results = in_thread(work) if second else work()
        found[name] = errors(results, exact[name])
    launches = list(driver.launches)
    driver.most_shared_bytes = 99 << 10  # of a consumer GPU
    nvrtc._kernel.cache_clear()
    kernel = cuda_chunked.SPLIT_IN_TWO.kernel("forward")
    refusal = refused(lambda: cuda._launch_on_device(torch.device("cpu"), kernel, 1, [0] * 16))
    origins = zip(driver.of_library, driver.libraries, strict=True)
    kernels = sorted({(source, name) for (source, _), library in origins for name in library})
    print(json.dumps({"launches": launches, "errors": found, "kernels": kernels, "refusal": refusal}))


if __name__ == "__main__":
    main()
