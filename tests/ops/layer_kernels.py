"""The layer's ops by name with realistic inputs, and their CUDA kernels run on the CPU, for several tests."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streaming_rwkv.ops import (
    cross_entropy_,
    launch,
    mixed_projections,
    nvrtc,
    relu_squared_projection,
    wkv7_inputs,
    wkv7_output,
)
from streaming_rwkv.ops.build import build_cpp, kernel_source

SOURCE = kernel_source(launch.CUDA_SOURCE)
RUNNER = Path(__file__).with_name("layer_kernels_on_cpu.cpp")


def cuda_on_cpu(*, seed: int = 0, left_out: int = 0) -> launch.Launch:
    """A substitute for the GPU: layer.cu under cuda_on_cpu.h.

    Args:
        seed: decides the order of threads.
        left_out: the line of a barrier that does nothing, or 0.
    """

    def run(kernel: launch.Kernel, blocks: int, arguments: Sequence[launch.Argument]) -> None:
        threads, values = launch.cuda_threads(kernel), launch.integers(arguments)
        emulate(kernel.name, launch.macros(kernel), blocks, threads, values, seed=seed, left_out=left_out)

    return run


def emulate(
    name: str,
    macros: nvrtc.Macros,
    blocks: int,
    threads: int,
    arguments: Sequence[int],
    *,
    seed: int = 0,
    left_out: int = 0,
) -> None:
    """Run one kernel of layer.cu on the CPU; `seed` and `left_out` as for `cuda_on_cpu`."""
    library = _library(macros)
    library.leave_out(SOURCE.name.encode(), left_out)
    packed = (ctypes.c_int64 * len(arguments))(*arguments)
    getattr(library, f"run_{name}")(blocks, threads, seed, packed)


@functools.cache
def _library(macros: nvrtc.Macros) -> ctypes.CDLL:
    flags = [f'-DSOURCE="{SOURCE}"', "-O1", *(f"-D{name}={value}" for name, value in macros)]
    return ctypes.CDLL(str(build_cpp(RUNNER, flags=flags, reads=[SOURCE])))


class OpCase(NamedTuple):
    """An op, its inputs by name, and the gradients of what it returns."""

    op: Callable[..., tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    gradients: list[Tensor]
    outputs: tuple[str, ...]


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().float()


def norm_mix_case(
    lengths: Sequence[int],
    *,
    width: int = 128,
    mixes: int = 6,
    padding: int = 0,
    rows: int | None = None,
    branch: bool = True,
    out: int = 32,
    narrow: torch.dtype | None = None,
) -> OpCase:
    """mixed_projections over documents packed in one row, or over `rows` rows of one length with `last`.

    `narrow` is the type of branch and products where it differs from the residual stream's.
    """
    g = torch.Generator().manual_seed(0)
    shape = (1, sum(lengths) + padding, width) if rows is None else (rows, lengths[0], width)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if rows is None else None
    inputs = {"x": _normal(g, *shape), "weight": 1 + _normal(g, width, scale=0.1), "bias": _normal(g, width, scale=0.1)}
    if branch:
        inputs["branch"] = _normal(g, *shape, scale=0.5)
    if rows is not None:
        inputs["last"] = _normal(g, rows, width)
    inputs |= {f"mix{n}": torch.rand(1, 1, width, generator=g).bfloat16().float() for n in range(mixes)}
    # One mix has two projections, as the values have.
    inputs |= {f"projection{n}": _normal(g, out, width, scale=width**-0.5) for n in range(mixes + 1)}

    def op(x: Tensor, weight: Tensor, bias: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        norm = nn.LayerNorm(width, device="meta")
        norm.weight, norm.bias = (nn.Parameter(torch.empty(0)) for _ in range(2))
        del norm.weight, norm.bias
        norm.weight, norm.bias = weight, bias
        weights = [[rest[f"projection{n}"]] for n in range(mixes)]
        weights[-1].append(rest[f"projection{mixes}"])
        dtype = rest["projection0"].dtype
        residual, products, after = mixed_projections(
            x, rest.get("branch"), norm, [rest[f"mix{n}"] for n in range(mixes)], weights,
            dtype=dtype, last=rest.get("last"), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return (residual, *products, *((after,) if rows is not None else ()))

    outputs = ("residual", *(f"product{n}" for n in range(mixes + 1)), *(("after",) if rows is not None else ()))
    gradients = [_normal(g, *shape), *(_normal(g, *shape[:2], out) for _ in range(mixes + 1))]
    if rows is not None:
        gradients.append(_normal(g, rows, width))
    return OpCase(op, inputs, gradients, outputs)


def wkv7_inputs_case(tokens: int, *, width: int = 128, residual: bool = True, rank: int = 16) -> OpCase:
    g = torch.Generator().manual_seed(1)
    shape = (1, tokens, width)
    inputs = {name: _normal(g, *shape) for name in ("k", "v", *(["v_first"] if residual else []))}
    for name, scale in (("decay", 3.0), ("share", 1.0), *([("value", 1.0)] if residual else [])):
        inputs[f"{name}_hidden"] = _normal(g, 1, tokens, rank)
        inputs[f"{name}_up"] = _normal(g, rank, width, scale=scale * rank**-0.5)
        inputs[f"{name}_offset"] = _normal(g, 1, 1, width)
    inputs |= {"k_k": 0.7 + _normal(g, 1, 1, width, scale=0.1), "k_a": 1 + _normal(g, 1, 1, width, scale=0.1)}

    def op(**x: Tensor) -> tuple[Tensor, ...]:
        def lora(name: str) -> tuple[Tensor, Tensor, Tensor]:
            return x[f"{name}_hidden"], x[f"{name}_up"], x[f"{name}_offset"]

        value = lora("value") if residual else None
        return wkv7_inputs(
            x["k"], x["v"], x.get("v_first"), lora("decay"), lora("share"), value, x["k_k"], x["k_a"], head_size=64
        )

    gradients = [_normal(g, 1, tokens, width // 64, 64) for _ in range(5)]
    return OpCase(op, inputs, gradients, ("log_decay", "k", "v", "removal", "replacement"))


def wkv7_output_case(tokens: int, *, width: int = 128) -> OpCase:
    g = torch.Generator().manual_seed(2)
    inputs = {name: _normal(g, 1, tokens, width // 64, 64) for name in ("y", "r", "k", "v")}
    inputs["gate"] = _normal(g, 1, tokens, width)
    inputs |= {"weight": 1 + _normal(g, width, scale=0.1), "bias": _normal(g, width, scale=0.1)}
    inputs["r_k"] = _normal(g, width // 64, 64, scale=0.1)
    return OpCase(lambda **x: (wkv7_output(**x, eps=64e-5),), inputs, [_normal(g, 1, tokens, width)], ("out",))


def relu_squared_case(tokens: int, *, width: int = 128) -> OpCase:
    g = torch.Generator().manual_seed(3)
    inputs = {"x": _normal(g, 1, tokens, width), "weight": _normal(g, 64, width, scale=width**-0.5)}
    return OpCase(lambda **x: (relu_squared_projection(**x),), inputs, [_normal(g, 1, tokens, 64)], ("out",))


# Parameters stay in float32, as under autocast; everything else is in the type of the test.
PARAMETERS = ("weight", "bias", "mix", "k_k", "k_a", "r_k", "_offset", "last")


def run(case: OpCase, dtype: torch.dtype, *, residual: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name, for inputs in `dtype`; x, the residual stream, may have a wider one."""
    mixed = "mix0" in case.inputs

    def cast(name: str, x: Tensor) -> Tensor:
        parameter = any(part in name for part in PARAMETERS) and not (
            name == "weight" and "x" in case.inputs and not mixed
        )
        if parameter:
            return x.to(torch.promote_types(dtype, torch.float32))
        return x.to(residual if residual is not None and mixed and name == "x" else dtype)

    leaves = {name: cast(name, x).detach().clone().requires_grad_() for name, x in case.inputs.items()}
    found = case.op(**leaves)
    gradients = [g.to(x.dtype) for g, x in zip(case.gradients, found, strict=True)]
    grads = torch.autograd.grad(found, list(leaves.values()), gradients)
    return {
        **{name: x.detach() for name, x in zip(case.outputs, found, strict=True)},
        **{f"d{name}": x for name, x in zip(leaves, grads, strict=True)},
    }


def cross_entropy_case(rows: int, width: int, *, scales: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(4)
    targets = torch.randint(width, (rows,), generator=g)
    targets[1::5] = -100
    return {
        "logits": _normal(g, rows, width, scale=3.0),
        "targets": targets,
        "scales": torch.rand(rows, generator=g) + 0.5 if scales else None,
    }


def run_cross_entropy(case: dict[str, Any], dtype: torch.dtype, *, gradient: bool = True) -> tuple[Tensor, Tensor]:
    logits = case["logits"].to(dtype, copy=True)
    scales = None if case["scales"] is None else case["scales"].to(torch.promote_types(dtype, torch.float32))
    return cross_entropy_(logits, case["targets"], scales, gradient=gradient), logits
