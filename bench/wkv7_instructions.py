"""The chunked WKV-7 kernels as machine code, without a GPU: registers, shared memory, and instructions per chunk.

    python bench/wkv7_instructions.py              for sm_90 and sm_80
    python bench/wkv7_instructions.py sm_120       for another architecture that NVRTC knows

NVRTC compiles the kernels, ptxas tells registers and spills, and nvdisasm, from the triton package, what loops hold.
A phase is counted in warp-instructions per chunk of 16 tokens and head, of all warps of a block together; branches that
are not always taken count as if they were. "plan" is the estimate from before the kernels were written; it leaves out
the copying of inputs.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from streaming_rwkv.ops import cuda, cuda_chunked
from streaming_rwkv.ops.build import kernel_source

REGISTERS, RESERVED_SHARED_BYTES = 65536, 1024  # of a multiprocessor; of a block, for the system
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # of a multiprocessor
PLAN = {"forward_wide": 2280, "backward_wide": 1900, "gradients": 7700}


class Phase(NamedTuple):
    name: str
    warps_per_chunk: float  # how many warps run its instructions for a chunk, on average


# Between the barriers of each kernel's code, in the order of the code. A group's inputs are copied by all of its warps.
PHASES = {
    "wide": (Phase("copy", 1), Phase("prepare", 1), Phase("follow", 2)),
    "narrow": (Phase("copy", 1), Phase("prepare", 1), Phase("follow", 4)),
    "gradients": (
        Phase("copy", 2), Phase("prepare", 1), Phase("backward", 4), Phase("forward", 4), Phase("pairs", 4),
        Phase("finish", 4),
    ),
}  # fmt: skip


class Code(NamedTuple):
    instructions: list[str]
    loops: list[tuple[int, int]]  # first and last instruction

    def innermost(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return loops within [start, stop) with matrix products and no other such loop inside."""
        inside = [(a, b) for a, b in self.loops if start <= a and b < stop and self.count("HMMA", a, b + 1)]
        return [x for x in inside if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in inside)]

    def count(self, opcode: str, start: int, stop: int) -> int:
        return sum(opcode in text for text in self.instructions[start:stop])

    def places(self, opcode: str) -> list[int]:
        return [n for n, text in enumerate(self.instructions) if opcode in text]


def nvdisasm() -> str:
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else None
    found = str(beside) if beside and beside.exists() else shutil.which("nvdisasm")
    if not found:
        sys.exit("nvdisasm: neither in the triton package nor on PATH; pip install triton")
    return found


def disassemble(cubin: bytes) -> dict[str, Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Code] = {}
    labels: dict[str, int] = {}
    branches: list[tuple[str, int, str]] = []
    name = ""
    for line in map(str.strip, text.splitlines()):
        if match := re.match(r"\.text\.(\w+):", line):
            name = match[1]
            kernels[name] = Code([], [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(kernels[name].instructions)
        elif name and (match := re.match(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line)):
            if target := re.search(r"\bBRA.*`\((\.L_x_\d+)\)", match[1]):
                branches.append((name, len(kernels[name].instructions), target[1]))
            kernels[name].instructions.append(match[1])
    for name, here, label in branches:
        if labels[label] <= here:
            kernels[name].loops.append((labels[label], here))
    return kernels


def instructions_per_chunk(name: str, code: Code) -> dict[str, float]:
    """Count instructions per chunk by phase: barriers separate phases, and in the last ones loops over chunks do."""
    barriers = code.places("BAR.SYNC")
    phases = next(phases for key, phases in PHASES.items() if name.endswith(key))
    if name.endswith("gradients"):
        copied, prepared = barriers[:2]
        bodies = [(0, copied), (copied, prepared), *code.innermost(prepared, len(code.instructions))]
        counts = [stop - start for start, stop in bodies]
    else:  # … barrier, copy, commit, prepare, barrier, follow: a loop
        first, second = barriers
        commit = next(n for n in code.places("LDGDEPBAR") if n > first)
        (follow,) = code.innermost(second, len(code.instructions))
        counts = [commit - first, second - commit, follow[1] - follow[0] + 1]
    return {phase.name: count * phase.warps_per_chunk for phase, count in zip(phases, counts, strict=True)}


def blocks_per_multiprocessor(kernel: cuda.Kernel, registers: int, architecture: str) -> int:
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = REGISTERS // (per_warp * kernel.threads // 32)
    by_memory = SHARED_BYTES.get(architecture, 100 << 10) // (kernel.shared_bytes + RESERVED_SHARED_BYTES)
    return min(by_registers, by_memory)


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Return registers and bytes spilled, by kernel, from ptxas' log."""
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, flags=re.DOTALL
    )
    return {name: (int(registers), int(spilled)) for name, spilled, registers in found}


def show(architecture: str) -> None:
    kernels = [
        *(shape.kernel(direction) for shape in cuda_chunked.SHAPES for direction in ("forward", "backward")),
        cuda_chunked.GRADIENTS,
    ]
    print(f"{architecture:32}{'registers':>10}{'spilled':>9}{'shared':>9}{'blocks/SM':>11}   instructions per chunk")
    for source, of_source in itertools.groupby(kernels, key=lambda kernel: kernel.source):
        cubin, log = cuda.compile_cubin(kernel_source(source), torch.bfloat16, architecture)
        code, used = disassemble(cubin), resources(log)
        for kernel in of_source:
            registers, spilled = used[kernel.name]
            name = kernel.name.removeprefix("wkv7_chunked_")
            line = f"{name:32}{registers:10}{spilled:9}{kernel.shared_bytes:9}"
            line += f"{blocks_per_multiprocessor(kernel, registers, architecture):11}   "
            if any(name.endswith(key) for key in PHASES):
                phases = instructions_per_chunk(name, code[kernel.name])
                line += " + ".join(f"{phase} {count:.0f}" for phase, count in phases.items())
                line += f" = {sum(phases.values()):.0f}"
            if name in PLAN:
                line += f" (plan {PLAN[name]})"
            opcodes = collections.Counter(re.sub(r"@!?U?P\d+ ", "", x).split(".")[0].split()[0]
                                          for x in code[kernel.name].instructions)  # fmt: skip
            print(line + f"; HMMA {opcodes['HMMA']} in the code")


def main() -> None:
    parser = argparse.ArgumentParser(description="The chunked WKV-7 kernels' machine code, without a GPU")
    parser.add_argument("architectures", nargs="*", default=["sm_90", "sm_80"])
    for architecture in parser.parse_args().architectures:
        show(architecture)


if __name__ == "__main__":
    main()
